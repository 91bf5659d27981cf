// The product of a block's weights and the exchanged states (persistent.h has the geometry).
//   registers      weights_: 4 words per chunk and tile of M; the sums of one tile of batch rows; two batches of packets
//   shared memory  the weights of further chunks; partial sums, two buffers in turn
//   barriers       none here; store_sums is followed by the caller's barrier, which also ends the use of the other buffer
#pragma once
#include "persistent_math.cuh"

namespace fused_rnn::cuda {

template <CellKind kCellValue, MathKind kMathValue, int kUnitTilesValue, bool kBackwardValue,
          template <class> class ExchangeOf>
struct PersistentGeometry {
  static constexpr CellKind kCell = kCellValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr bool kBackward = kBackwardValue;
  static constexpr FUSED_RNN_HD PersistentShape shape() { return {kCell, kMath, kUnitTilesValue, kBackward}; }
  using Chunk = typename ChunkOf<kMath>::type;
  using Storage = typename Chunk::Storage;
  using Exchange = ExchangeOf<Chunk>;
  static constexpr int kUnitTiles = kUnitTilesValue;
  static constexpr int kUnits = slice_units(shape());
  static constexpr int kMTiles = m_tiles(shape());
  static constexpr int kBatch = chunk_batch(shape());
  static constexpr int kRegisterChunks = register_chunks(shape());
  static_assert(Chunk::kStep == chunk_step(kMath) && kUnits % Chunk::kStep == 0);
  static_assert(kRegisterChunks % kBatch == 0);
};

// Where a block is in its launch.
struct BlockPlace {
  int slice, group, dir;
  int tiles;  // with rows below B, at most l.tiles; the same in all blocks of a group
  int64_t first_row;
};
__device__ __forceinline__ BlockPlace block_place(const PersistentLaunch& l, int64_t B) {
  BlockPlace place;
  place.slice = simt::block_x() % l.slices;
  const int group = simt::block_x() / l.slices;
  place.group = group;
  place.dir = l.first_dir + group / l.groups;
  place.first_row = l.first_row + static_cast<int64_t>(group % l.groups) * l.tiles * kTileRows;
  const int64_t rows = B - place.first_row;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  place.tiles = tiles < 0 ? 0 : tiles < l.tiles ? static_cast<int>(tiles) : l.tiles;
  return place;
}

template <class G>
class PersistentProduct {
  using Chunk = typename G::Chunk;
  using Storage = typename G::Storage;
  using Exchange = typename G::Exchange;
  using Packet = typename Exchange::Packet;
  static constexpr int kBatch = G::kBatch, kMTiles = G::kMTiles;

 public:
  using Sums = float[kMTiles][Chunk::kAcc];

  // w_hh: [gates, H, H] of this direction.
  __device__ __forceinline__ PersistentProduct(const void* w_hh, int64_t H, const PersistentLaunch& l, int slice, int group)
      : exchange(l, G::shape(), group), smem_(persistent_smem(G::shape(), l.slices, l.tiles, Exchange::kCluster)) {
    const int chunks = chunk_count(G::shape(), l.slices), warp = simt::warp_id();
    chunks_ = chunks > warp ? (chunks - warp + kPersistentWarps - 1) / kPersistentWarps : 0;
    smem_chunks_ = smem_chunks(G::shape(), l.slices);
    const auto* weights = static_cast<const Storage*>(w_hh);
    const int per_gate = chunks / published(G::shape());
#pragma unroll
    for (int i = 0; i < G::kRegisterChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        weights_[i][m][0] = weights_[i][m][1] = weights_[i][m][2] = weights_[i][m][3] = 0;
        if (i < chunks_) load_fragment(weights_[i][m], weights, H, slice, per_gate, m, chunk_of(i));
      }
    }
#pragma unroll 1
    for (int i = G::kRegisterChunks; i < chunks_; ++i) {
#pragma unroll 1
      for (int m = 0; m < kMTiles; ++m) {
        simt::Vec<uint32_t, 4> words;
        load_fragment(words.v, weights, H, slice, per_gate, m, chunk_of(i));
        simt::store_vec(smem_fragment(i, m), words);
      }
    }
  }

  // sums = weights x the states of `step` of batch tile `tile`, over the warp's chunks.
  __device__ __forceinline__ void run(Sums& sums, int tile, int64_t step) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < Chunk::kAcc; ++i) sums[m][i] = 0.0f;
    }
    exchange.begin(tile, step);
    Packet now[kBatch], next[kBatch];
    request(now, 0, tile, step);
#pragma unroll
    for (int first = 0; first < G::kRegisterChunks; first += kBatch) {
      if (first >= chunks_) break;
      request(next, first + kBatch, tile, step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i < chunks_) multiply(sums, now[i], weights_[first + i], first + i, tile, step);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i] = next[i];
    }
#pragma unroll 1
    for (int first = G::kRegisterChunks; first < chunks_; first += kBatch) {
      request(next, first + kBatch, tile, step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i >= chunks_) break;
        uint32_t weights[kMTiles][4];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          const auto words = simt::load_vec<4>(smem_fragment(first + i, m));
#pragma unroll
          for (int w = 0; w < 4; ++w) weights[m][w] = words.v[w];
        }
        multiply(sums, now[i], weights, first + i, tile, step);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) now[i] = next[i];
    }
  }

  __device__ __forceinline__ void store_sums(const Sums& sums, int buffer) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) Chunk::store(sums[m], partial(buffer, simt::warp_id(), m));
  }
  // The sum over all warps of unit `unit` of the slice (and gate `gate`, forward) and row b; after the barrier.
  __device__ __forceinline__ float sum(int buffer, int gate, int unit, int b) const {
    const int m = gate * G::kUnitTiles + unit / kTileUnits;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kPersistentWarps; ++warp) {
      total += partial(buffer, warp, m)[b * kPartialPitch + unit % kTileUnits];
    }
    return total;
  }

  // What this thread keeps of element `unit`, `b` of a tile between steps; which: 0 or 1.
  __device__ __forceinline__ float& state(int which, int tile, int unit, int b, int tiles) const {
    return reinterpret_cast<float*>(simt::dynamic_smem() +
                                    smem_.state)[((which * tiles + tile) * kTileRows + b) * G::kUnits + unit];
  }
  __device__ __forceinline__ int64_t* lengths() const {
    return reinterpret_cast<int64_t*>(simt::dynamic_smem() + smem_.lengths);
  }

  Exchange exchange;

 private:
  static __device__ __forceinline__ int chunk_of(int i) { return simt::warp_id() + i * kPersistentWarps; }

  static __device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const Storage* weights, int64_t H, int slice,
                                                       int per_gate, int m_tile, int chunk) {
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

  __device__ __forceinline__ void request(Packet (&packets)[kBatch], int first, int tile, int64_t step) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < chunks_) exchange.request(packets[i], tile, chunk_of(first + i), step);
    }
  }
  __device__ __forceinline__ void multiply(Sums& sums, Packet& packet, const uint32_t (&weights)[kMTiles][4], int i,
                                           int tile, int64_t step) const {
    exchange.await(packet, tile, chunk_of(i), step);
    uint32_t x[2];
    Exchange::words(packet, x);
    auto* scratch = reinterpret_cast<float*>(simt::dynamic_smem() + smem_.scratch);
    Chunk::multiply(sums, weights, x, scratch + (simt::warp_id() * 2 + i % 2) * (kScratchFloats / 2));
  }
  __device__ __forceinline__ uint32_t* smem_fragment(int i, int m) const {
    const int index = (simt::warp_id() * smem_chunks_ + i - G::kRegisterChunks) * kMTiles + m;
    return reinterpret_cast<uint32_t*>(simt::dynamic_smem() + smem_.weights) + index * 128 + simt::lane_id() * 4;
  }
  __device__ __forceinline__ float* partial(int buffer, int warp, int m) const {
    return reinterpret_cast<float*>(simt::dynamic_smem() + smem_.partials) +
           (buffer * kPersistentWarps + warp) * partial_floats(G::shape()) + m * kTileRows * kPartialPitch;
  }

  uint32_t weights_[G::kRegisterChunks][kMTiles][4];
  PersistentSmem smem_;
  int chunks_;  // of this warp
  int smem_chunks_;
};

}  // namespace fused_rnn::cuda
