// The product of a block's weights and the gradients of its own gates, and the exchange of the partial gradients of the
// states ("scatter" in persistent_geometry.h).
//   registers      weights_: 4 words per chunk for each of the first tiles of M; the sums of all tiles of M of the warp
//   shared memory  the weights of further tiles of M; the gradients of the slice's gates, two buffers in turn; what was
//   received
//   barriers       the caller's, between put and run; it also ends the use of the other buffer
// A buffer of received sums is free when it is written again: a block that pushes for step s + 2 has received the sums of
// step s + 1 from every block, and each block sent those after the barrier that followed its reading of step s.
#pragma once
#include "cuda/persistent/exchange_cluster.cuh"
#include "cuda/persistent/persistent_memory.cuh"

namespace fused_rnn::cuda {

template <class G>
class ScatterProduct : public BlockMemory<G> {
  using Chunk = typename G::Chunk;
  using Storage = typename G::Storage;
  static constexpr int kChunks = scatter_chunks(G::shape()), kOwnWords = own_words(G::kMath);
  static constexpr int kTiles = scatter_tiles(G::shape(), kMaxClusterBlocks), kRegisterTiles = register_tiles(G::shape());
  static_assert(kRegisterTiles > 0 && Chunk::kStep == chunk_step(G::kMath));

 public:
  // w_hh: [gates, H, H] of this direction.
  __device__ __forceinline__ ScatterProduct(const void* w_hh, int64_t H, const PersistentLaunch& l, int slice, int)
      : BlockMemory<G>(l), exchange(l, G::shape()), slice_(slice) {
    const auto* weights = static_cast<const Storage*>(w_hh);
#pragma unroll
    for (int j = 0; j < kRegisterTiles; ++j) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        weights_[j][c][0] = weights_[j][c][1] = weights_[j][c][2] = weights_[j][c][3] = 0;
        if (tile_of(j) < all_tiles()) load_fragment(weights_[j][c], weights, H, tile_of(j), c);
      }
    }
#pragma unroll 1
    for (int j = kRegisterTiles; j < kRegisterTiles + smem_tiles_of_warp(); ++j) {
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) {
        simt::Vec<uint32_t, 4> words;
        load_fragment(words.v, weights, H, tile_of(j), c);
        simt::store_vec(smem_fragment(j, c), words);
      }
    }
  }

  // The gradient of gate `gate` of one unit of the slice.
  __device__ __forceinline__ void put(int buffer, int gate, int unit, int b, float value) const {
    constexpr int kPerGate = G::kUnits / Chunk::kStep;
    Chunk::put(own(buffer, gate * kPerGate + unit / Chunk::kStep), unit % Chunk::kStep, b, value);
  }

  // Multiplies what was put to `buffer` and sends the sums to their owners.
  __device__ __forceinline__ void run(int buffer, int row_tile, uint32_t step) const {
    run_with<kRegisterTiles>(buffer, row_tile, step);
  }

  // The sum over what all blocks sent for one element; after exchange.begin.
  __device__ __forceinline__ float sum(int unit, int b, int row_tile, uint32_t step) const {
    return exchange.sum(b * G::kUnits + unit, row_tile, step);
  }

  ClusterScatter exchange;

 private:
  __device__ __forceinline__ int all_tiles() const { return exchange.ranks * G::kUnitTiles; }
  __device__ __forceinline__ int smem_tiles_of_warp() const { return smem_tiles(G::shape(), exchange.ranks); }
  // The tile of M that is the warp's j-th.
  static __device__ __forceinline__ int tile_of(int j) { return simt::warp_id() + j * kPersistentWarps; }

  __device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const Storage* weights, int64_t H, int m_tile,
                                                int chunk) const {
    constexpr int kPerGate = G::kUnits / Chunk::kStep;
    Chunk::load(words, [&](int m, int k) -> Storage {
      const int64_t unit = slice_ * G::kUnits + chunk % kPerGate * Chunk::kStep + k;
      const int64_t column = static_cast<int64_t>(m_tile) * kTileUnits + m;
      const bool valid = unit < H && column < H;
      return valid ? weights[(chunk / kPerGate * H + unit) * H + column] : Storage{};
    });
  }

  // kCount: tiles of M of every warp, in registers and shared memory together.
  template <int kCount>
  __device__ __forceinline__ void run_with(int buffer, int row_tile, uint32_t step) const {
    if constexpr (kCount < kTiles) {
      if (kCount < kRegisterTiles + smem_tiles_of_warp()) return run_with<kCount + 1>(buffer, row_tile, step);
    }
    float sums[kCount][Chunk::kAcc];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < Chunk::kAcc; ++i) sums[j][i] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint32_t weights[kCount][4];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (j < kRegisterTiles) {
#pragma unroll
          for (int w = 0; w < 4; ++w) weights[j][w] = weights_[j < kRegisterTiles ? j : 0][c][w];
        } else {
          const auto words = simt::load_vec<4>(smem_fragment(j, c));
#pragma unroll
          for (int w = 0; w < 4; ++w) weights[j][w] = words.v[w];
        }
      }
      Chunk::multiply_own(sums, weights, own(buffer, c));
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) send(sums[j], tile_of(j), row_tile, step);
  }

  __device__ __forceinline__ void send(const float (&sums)[Chunk::kAcc], int m_tile, int row_tile, uint32_t step) const {
    if (m_tile >= all_tiles()) return;
    const RowPiece piece = Chunk::rows(sums);
    const int unit = m_tile % G::kUnitTiles * kTileUnits + piece.unit;
    exchange.push(piece, m_tile / G::kUnitTiles, piece.b * G::kUnits + unit, slice_, row_tile, step);
  }

  __device__ __forceinline__ uint32_t* own(int buffer, int chunk) const {
    return this->template at<uint32_t>(this->kSmem.partials) + (buffer * kChunks + chunk) * kOwnWords;
  }
  __device__ __forceinline__ uint32_t* smem_fragment(int j, int chunk) const {
    const int index = (simt::warp_id() * smem_tiles_of_warp() + j - kRegisterTiles) * kChunks + chunk;
    return this->template at<uint32_t>(this->kSmem.weights) + index * 128 + simt::lane_id() * 4;
  }

  uint32_t weights_[kRegisterTiles][kChunks][4];
  int slice_;
};

}  // namespace fused_rnn::cuda
