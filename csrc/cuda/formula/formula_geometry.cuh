// What the kernels of a formula are compiled for, as step/matmul.cuh wants to have it: a product of kGroups blocks of weight
// rows. A block of the grid owns kUnits units of one head of kBatch batch rows in one direction.
//   blockIdx.x  row tile;  blockIdx.y  [heads][tiles of a head's units];  blockIdx.z  direction
#pragma once
#include <utility>

#include "cuda/formula/formula_params.h"
#include "cuda/step/matmul.cuh"
#include "cuda/step/rows.cuh"

namespace fused_rnn::cuda {

// kBackwardValue: the weights are read [K][units].
template <bool kBackwardValue, int kGroupsValue, MathKind kMathValue, TileSize kSizeValue>
struct FormulaGeometry {
  static constexpr KernelRole kRole = kBackwardValue ? KernelRole::kBackward : KernelRole::kForward;
  static constexpr MathKind kMath = kMathValue;
  static constexpr TileShape kTile = tile_shape(kRole, kMath, kSizeValue);
  using Storage = typename StorageOf<kMath>::type;
  using Acc = std::conditional_t<kMath == MathKind::kFp64, double, float>;

  static constexpr bool kUnitMajor = is_unit_major(kRole);
  static constexpr int kUnits = kTile.units, kBatch = kTile.batch;
  static constexpr int kTeams = kTile.teams;
  static constexpr int kTeamThreads = 32 * kTile.warps_u * kTile.warps_b;
  static constexpr int kThreads = tile_threads(kTile);
  static constexpr int kChunk = chunk_size(kMath);
  static constexpr int kGroups = kGroupsValue > 0 ? kGroupsValue : 1;
  static constexpr int kSlots = kGroups;
  static constexpr int kOperands = 1;
  static constexpr bool kModified = false;
  static constexpr int kPitch = unit_pitch_bytes(kTile, kMath);
  static constexpr int kWeightBytes = weight_stage_bytes(kRole, kGroups, kMath, kTile);
  static constexpr int kStageBytes = stage_bytes(kRole, kGroups, kMath, kTile);
  static constexpr int kSumPitch = sum_pitch(kSlots, kTile);
  static constexpr int kTableBytes = table_bytes(kTile);
  static constexpr int kAtomsU = kUnits / 16 / kTile.warps_u, kAtomsB = kBatch / 8 / kTile.warps_b;
  static constexpr int kElements = (kUnits * kBatch + kThreads - 1) / kThreads;
  using Accumulators = Acc[kSlots][kAtomsU][kAtomsB][4];

  static_assert(kUnits % (16 * kTile.warps_u) == 0 && kBatch % (8 * kTile.warps_b) == 0);
  static_assert(kBatch <= kThreads, "one thread fills in each row of the table");
  static_assert(kWeightBytes % 16 == 0 && kStageBytes % 16 == 0 && kTableBytes % 128 == 0);

  static constexpr __device__ int slot(int, int g) { return g; }
};

// Calls f(std::integral_constant<int, k>{}) for all phases k of the cell.
template <class F, int... kIndices>
__device__ __forceinline__ void formula_for_phases(F&& f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}
template <class C, class F>
__device__ __forceinline__ void formula_for_phases(F&& f) {
  formula_for_phases(f, std::make_integer_sequence<int, C::kPhases>{});
}

// The first and the last phase of a level (formula_params.h), in the order of the phases.
template <class C, bool kBackward, int kLevel>
struct FormulaLevelEnds {
  static constexpr int level(int k) { return kBackward ? C::backward_level(k) : C::forward_level(k); }
  static constexpr int find(int k, int step) {
    while (level(k) != kLevel) k += step;
    return k;
  }
  static constexpr int kFirst = find(0, 1), kLast = find(C::kPhases - 1, -1);
};

// Where a block's tile lies, and which of its elements (unit, row) a thread finishes.
template <class G>
struct FormulaTile {
  int dir, head;
  int64_t units;       // of a head
  int64_t first_unit;  // in the head
  int64_t first_row;

  __device__ __forceinline__ FormulaTile(const FormulaLayer& p) : dir(simt::block_z()), units(p.H / p.heads) {
    const int tiles = static_cast<int>((units + G::kUnits - 1) / G::kUnits);
    head = simt::block_y() / tiles;
    first_unit = static_cast<int64_t>(simt::block_y() % tiles) * G::kUnits;
    first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  }
  static __device__ __forceinline__ int unit_of(int e) { return (simt::thread_x() + e * G::kThreads) % G::kUnits; }
  static __device__ __forceinline__ int batch_of(int e) { return (simt::thread_x() + e * G::kThreads) / G::kUnits; }
  // Unit of the layer.
  __device__ __forceinline__ int64_t unit(int e) const { return head * units + first_unit + unit_of(e); }
  // Whether element e is inside the problem.
  __device__ __forceinline__ bool exists(int e, const RowInfo* table) const {
    return batch_of(e) < G::kBatch && first_unit + unit_of(e) < units && table[batch_of(e)].flags & kExists;
  }
};

// Element `index` of an array of the dtype or of the arithmetic type.
template <class T>
__device__ __forceinline__ auto formula_load(const void* array, int64_t index) {
  return simt::to_float(static_cast<const T*>(array)[index]);
}
template <class T, class V>
__device__ __forceinline__ void formula_store(void* array, int64_t index, V value) {
  static_cast<T*>(array)[index] = simt::from_float<T>(value);
}

}  // namespace fused_rnn::cuda
