// The product of a block's weights and the exchanged states ("gather" in persistent_geometry.h).
//   registers      weights_: 4 words per chunk and tile of M of the warp; the sums of one row tile; states under way
//   shared memory  the weights of further chunks; partial sums, two buffers in turn
//   barriers       none here; the caller's barrier follows store_sums, and it also ends the use of the other buffer
#pragma once
#include "cuda/persistent/persistent_memory.cuh"

namespace fused_rnn::cuda {

template <class G>
class PersistentProduct : public BlockMemory<G> {
  using Chunk = typename G::Chunk;
  using Storage = typename G::Storage;
  using Exchange = typename G::Exchange;
  using Packet = typename Exchange::Packet;
  static constexpr int kBatch = chunk_batch(G::shape()), kRegisterChunks = register_chunks(G::shape());
  static constexpr int kTiles = warp_tiles(G::shape());  // of M, of a warp
  static constexpr int kMGroups = m_groups(G::shape()), kKGroups = k_groups(G::shape());
  static_assert(kRegisterChunks % kBatch == 0 && kTiles * kMGroups == m_tiles(G::shape()));

 public:
  using Sums = float[kTiles][Chunk::kAcc];

  // w_hh: [gates, H, H] of this direction.
  __device__ __forceinline__ PersistentProduct(const void* w_hh, int64_t H, const PersistentLaunch& l, int slice, int group)
      : BlockMemory<G>(l), exchange(l, G::shape(), group) {
    const int chunks = chunk_count(G::shape(), l.slices);
    chunks_ = (chunks - k_group() + kKGroups - 1) / kKGroups;
    smem_chunks_ = smem_chunks(G::shape(), l.slices);
    const auto* weights = static_cast<const Storage*>(w_hh);
    const int per_gate = chunks / published(G::shape());
#pragma unroll
    for (int i = 0; i < kRegisterChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        weights_[i][m][0] = weights_[i][m][1] = weights_[i][m][2] = weights_[i][m][3] = 0;
        if (i < chunks_) load_fragment(weights_[i][m], weights, H, slice, per_gate, m, chunk_of(i));
      }
    }
    // A warp with fewer chunks than others has zeros in their place.
#pragma unroll 1
    for (int i = kRegisterChunks; i < kRegisterChunks + smem_chunks_; ++i) {
#pragma unroll 1
      for (int m = 0; m < kTiles; ++m) {
        simt::Vec<uint32_t, 4> words{};
        if (i < chunks_) load_fragment(words.v, weights, H, slice, per_gate, m, chunk_of(i));
        simt::store_vec(smem_fragment(i, m), words);
      }
    }
  }

  // sums = weights x the states of a row tile at exchange `step`, over the warp's chunks.
  __device__ __forceinline__ void run(Sums& sums, int row_tile, uint32_t step) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < Chunk::kAcc; ++i) sums[m][i] = 0.0f;
    }
    exchange.begin(row_tile, step);
    // Plain multiply-adds leave no registers for loads far ahead, and no latency to hide.
    if constexpr (G::kCluster && G::kMath != MathKind::kFp32) {
      run_paired(sums, row_tile, step);
    } else {
      run_in_turn(sums, row_tile, step);
    }
  }

  __device__ __forceinline__ void store_sums(const Sums& sums, int buffer) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) Chunk::store(sums[m], partial(buffer, k_group(), m_group() * kTiles + m));
  }
  // The sum over all chunk groups of an element (and gate `gate`, forward); after the barrier.
  template <class Place>
  __device__ __forceinline__ float sum(int buffer, int gate, const Place& e) const {
    const int m = gate * G::kUnitTiles + e.unit / kTileUnits;
    float total = 0.0f;
#pragma unroll
    for (int group = 0; group < kKGroups; ++group) {
      total += partial(buffer, group, m)[e.b * kPartialPitch + e.unit % kTileUnits];
    }
    return total;
  }

  Exchange exchange;

 private:
  static __device__ __forceinline__ int k_group() { return simt::warp_id() % kKGroups; }
  static __device__ __forceinline__ int m_group() { return simt::warp_id() / kKGroups; }
  static __device__ __forceinline__ int chunk_of(int i) { return k_group() + i * kKGroups; }

  // Chunks in registers and chunks in shared memory alternate, so that the loads of the latter hide behind the products of
  // the former. The states of chunks that the warp does not have are zeros: no branch stands between the loads of a batch.
  __device__ __forceinline__ void run_paired(Sums& sums, int row_tile, uint32_t step) {
    int beyond = 0;  // chunks in shared memory that are done
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kBatch) {
      if (first >= chunks_) break;
      if (first + kBatch <= smem_chunks_) {
#pragma unroll
        for (int i = first; i < first + kBatch; ++i) {
          multiply_smem_chunk(sums, kRegisterChunks + i, row_tile, step);
          multiply_zeros_beyond(sums, weights_[i], i, row_tile, step);
        }
        beyond = first + kBatch;
      } else {
#pragma unroll
        for (int i = first; i < first + kBatch; ++i) multiply_zeros_beyond(sums, weights_[i], i, row_tile, step);
      }
    }
#pragma unroll 2
    for (; beyond < smem_chunks_; ++beyond) multiply_smem_chunk(sums, kRegisterChunks + beyond, row_tile, step);
  }

  // For states that come from L2: a batch is requested before the preceding batch is awaited.
  __device__ __forceinline__ void run_in_turn(Sums& sums, int row_tile, uint32_t step) {
    Packet now[kBatch], next[kBatch];
    request(now, 0, row_tile, step);
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kBatch) {
      if (first >= chunks_) break;
      request(next, first + kBatch, row_tile, step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < chunks_) multiply(sums, now[i], weights_[first + i], first + i, row_tile, step);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i] = next[i];
    }
#pragma unroll 1
    for (int first = kRegisterChunks; first < chunks_; first += kBatch) {
      request(next, first + kBatch, row_tile, step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= chunks_) break;
        uint32_t weights[kTiles][4];
        load_smem_weights(weights, first + i);
        multiply(sums, now[i], weights, first + i, row_tile, step);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i] = next[i];
    }
  }

  // m_tile: number among the warp's tiles of M.
  static __device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const Storage* weights, int64_t H, int slice,
                                                       int per_gate, int m_tile, int chunk) {
    m_tile += m_group() * kTiles;
    Chunk::load(words, [&](int m, int k) -> Storage {
      int64_t row, column;
      bool valid;
      if constexpr (G::kBackward) {
        const int gate = chunk / per_gate;
        const int64_t other = static_cast<int64_t>(chunk % per_gate) * Chunk::kStep + k;
        column = slice * G::kUnits + m_tile * kTileUnits + m;
        row = gate * H + other;
        valid = other < H && column < H;
      } else {
        const int64_t unit = slice * G::kUnits + m_tile % G::kUnitTiles * kTileUnits + m;
        column = static_cast<int64_t>(chunk) * Chunk::kStep + k;
        row = m_tile / G::kUnitTiles * H + unit;
        valid = unit < H && column < H;
      }
      return valid ? weights[row * H + column] : Storage{};
    });
  }

  __device__ __forceinline__ void request(Packet (&packets)[kBatch], int first, int row_tile, uint32_t step) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < chunks_) exchange.request(packets[i], row_tile, chunk_of(first + i), step);
    }
  }
  __device__ __forceinline__ void multiply(Sums& sums, Packet& packet, const uint32_t (&weights)[kTiles][4], int i,
                                           int row_tile, uint32_t step) const {
    exchange.await(packet, row_tile, chunk_of(i), step);
    uint32_t x[2];
    Exchange::words(packet, x);
    auto* scratch = this->template at<float>(this->kSmem.scratch);
    Chunk::multiply(sums, weights, x, scratch + (simt::warp_id() * 2 + i % 2) * kScratchFloats);
  }
  __device__ __forceinline__ void multiply_zeros_beyond(Sums& sums, const uint32_t (&weights)[kTiles][4], int i,
                                                        int row_tile, uint32_t step) const {
    Packet packet{};
    if (i < chunks_) exchange.request(packet, row_tile, chunk_of(i), step);
    multiply(sums, packet, weights, i, row_tile, step);
  }
  __device__ __forceinline__ void multiply_smem_chunk(Sums& sums, int i, int row_tile, uint32_t step) const {
    uint32_t weights[kTiles][4];
    load_smem_weights(weights, i);
    multiply_zeros_beyond(sums, weights, i, row_tile, step);
  }
  __device__ __forceinline__ void load_smem_weights(uint32_t (&weights)[kTiles][4], int i) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const auto words = simt::load_vec<4>(smem_fragment(i, m));
#pragma unroll
      for (int w = 0; w < 4; ++w) weights[m][w] = words.v[w];
    }
  }
  __device__ __forceinline__ uint32_t* smem_fragment(int i, int m) const {
    const int index = (simt::warp_id() * smem_chunks_ + i - kRegisterChunks) * kTiles + m;
    return this->template at<uint32_t>(this->kSmem.weights) + index * 128 + simt::lane_id() * 4;
  }
  __device__ __forceinline__ float* partial(int buffer, int k_group, int m) const {
    return this->template at<float>(this->kSmem.partials) + (buffer * kKGroups + k_group) * partial_floats(G::shape()) +
           m * kTileRows * kPartialPitch;
  }

  uint32_t weights_[kRegisterChunks][kTiles][4];
  int chunks_;  // of this warp
  int smem_chunks_;
};

}  // namespace fused_rnn::cuda
