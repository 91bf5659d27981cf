// The constants of a persistent kernel, where a block is in its launch, and the part of the block's shared memory that does
// not depend on the kind of product.
#pragma once
#include "cuda/persistent/persistent_math.cuh"

namespace fused_rnn::cuda {

template <CellKind kCellValue, MathKind kMathValue, int kUnitTilesValue, bool kBackwardValue,
          template <class> class ExchangeOf>
struct PersistentGeometry {
  static constexpr CellKind kCell = kCellValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr bool kBackward = kBackwardValue, kBlock = false;
  using Chunk = typename ChunkOf<kMath>::type;
  using Storage = typename Chunk::Storage;
  using Exchange = ExchangeOf<Chunk>;  // of a gather product
  static constexpr bool kCluster = Exchange::kCluster;
  static constexpr FUSED_RNN_HD PersistentShape shape() { return {kCell, kMath, kUnitTilesValue, kBackward, kCluster}; }
  static constexpr int kUnitTiles = kUnitTilesValue;
  static constexpr int kUnits = slice_units(shape());
  static constexpr bool kScatters = scatters(shape());
  static_assert(Chunk::kStep == chunk_step(kMath) && kUnits % Chunk::kStep == 0);
};

// Where a block is in its launch.
struct BlockPlace {
  int slice, group, dir;
  int row_tiles;  // with rows below B, 1 to l.row_tiles; the same in all blocks of a group
  int rows;       // of the group that are below B
  int first_row;
};
__device__ __forceinline__ BlockPlace block_place(const PersistentLaunch& l, int64_t B) {
  BlockPlace place;
  place.slice = simt::block_x() % l.slices;
  const int group = simt::block_x() / l.slices;
  place.group = group;
  place.dir = l.first_dir + group / l.groups;
  place.first_row = simt::opaque(static_cast<int>(l.first_row) + group % l.groups * l.row_tiles * kTileRows);
  const int rows = static_cast<int>(B) - place.first_row, most = l.row_tiles * kTileRows;
  place.rows = rows < most ? rows : most;
  place.row_tiles = (place.rows + kTileRows - 1) / kTileRows;
  return place;
}

template <class G>
class BlockMemory {
 public:
  __device__ __forceinline__ explicit BlockMemory(const PersistentLaunch& l)
      : states_(persistent_smem(G::shape(), l.slices, l.row_tiles).state) {}

  // What a thread keeps between steps of the element (unit, b) of a row tile; which: 0 or 1. row_tile: counted from the
  // first whose states are not in registers.
  __device__ __forceinline__ float& state(int which, int row_tile, int unit, int b) const {
    return at<float>(states_)[((row_tile * 2 + which) * kTileRows + b) * G::kUnits + unit];
  }
  static __device__ __forceinline__ int* lengths() { return at<int>(kSmem.lengths); }
  static __device__ __forceinline__ float& bias(int gate, int unit) {
    return at<float>(kSmem.biases)[gate * G::kUnits + unit];
  }

 protected:
  static constexpr PersistentSmem kSmem = persistent_smem(G::shape(), 1, 1);  // right up to the place of the weights
  template <class T>
  static __device__ __forceinline__ T* at(int offset) {
    return reinterpret_cast<T*>(simt::dynamic_smem() + offset);
  }

 private:
  int states_;  // bytes
};

}  // namespace fused_rnn::cuda
