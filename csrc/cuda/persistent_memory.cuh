// What the kernels of the persistent families know at compile time, where a block is in its launch, and the part of its shared
// memory that does not depend on the kind of product.
#pragma once
#include "persistent_math.cuh"

namespace fused_rnn::cuda {

template <CellKind kCellValue, MathKind kMathValue, int kUnitTilesValue, bool kBackwardValue,
          template <class> class ExchangeOf>
struct PersistentGeometry {
  static constexpr CellKind kCell = kCellValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr bool kBackward = kBackwardValue;
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
  int tiles;  // with rows below B, 1 to l.tiles; the same in all blocks of a group
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
  place.tiles = tiles < l.tiles ? static_cast<int>(tiles) : l.tiles;
  return place;
}

template <class G>
class BlockMemory {
 public:
  __device__ __forceinline__ explicit BlockMemory(const PersistentLaunch& l)
      : smem_(persistent_smem(G::shape(), l.slices, l.tiles)) {}

  // What a thread keeps of element `unit`, `b` of a tile between steps; which: 0 or 1.
  __device__ __forceinline__ float& state(int which, int tile, int unit, int b, int tiles) const {
    return reinterpret_cast<float*>(simt::dynamic_smem() +
                                    smem_.state)[((which * tiles + tile) * kTileRows + b) * G::kUnits + unit];
  }
  __device__ __forceinline__ int64_t* lengths() const {
    return reinterpret_cast<int64_t*>(simt::dynamic_smem() + smem_.lengths);
  }

 protected:
  PersistentSmem smem_;
};

}  // namespace fused_rnn::cuda
