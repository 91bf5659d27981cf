// What the kernels of a formula are compiled for, as step/matmul.cuh wants to have it: a product of kGroups blocks of weight
// rows. A block of the grid owns kUnits units of one head of kBatch batch rows in one direction.
//   blockIdx.x  row tile;  blockIdx.y  [heads][tiles of a head's units];  blockIdx.z  direction
#pragma once
#include <utility>

#include "core/formula_call.h"
#include "cuda/formula/formula_params.h"
#include "cuda/step/matmul.cuh"
#include "cuda/step/rows.cuh"

namespace fused_rnn::cuda {

constexpr KernelRole formula_role(bool backward) { return backward ? KernelRole::kBackward : KernelRole::kForward; }

// kBackward: the weights are read [K][units]. kGroups: 0 where there is no product.
template <bool kBackward, int kGroups, MathKind kMath, TileSize kSize>
struct FormulaGeometry
    : ProductGeometry<formula_role(kBackward), kMath, kSize, (kGroups > 0 ? kGroups : 1), (kGroups > 0 ? kGroups : 1)> {
  static constexpr __device__ int slot(int, int g) { return g; }
};

// The same of family `single`, whose first segment makes the input products too: of its two phases the first multiplies the
// rows of W_ih. Sums of both go to the cell's accumulators.
template <class C, MathKind kMath, TileSize kSize>
struct FormulaSingleGeometry
    : ProductGeometry<KernelRole::kForwardInput, kMath, kSize,
                      (C::kInputGates > C::kRecurrentGates ? C::kInputGates : C::kRecurrentGates), C::kSlots> {
  static constexpr bool kStrided = true;
  static constexpr __device__ int groups(int phase) { return phase == 0 ? C::kInputGates : C::kRecurrentGates; }
  static constexpr __device__ int slot(int phase, int g) { return phase == 0 ? C::input_slot(g) : C::recurrent_slot(g); }
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

// Calls active(e, info) for the thread's elements whose rows take part in the step, and inactive(e, info) for the others.
template <class G, class Active, class Inactive>
__device__ __forceinline__ void formula_for_elements(const FormulaTile<G>& tile, const RowInfo* table, Active&& active,
                                                     Inactive&& inactive) {
#pragma unroll(G::kElements <= 1 ? 1 : 2)
  for (int e = 0; e < G::kElements; ++e) {
    if (!tile.exists(e, table)) continue;
    const RowInfo& info = table[FormulaTile<G>::batch_of(e)];
    if (info.flags & kActive) {
      active(e, info);
    } else {
      inactive(e, info);
    }
  }
}

// What a part of a launch does before its elements: fills in the table of rows by row(b), where source 0 is what the row's
// product or norm reads (null: zeros), makes the product if it has one, else calls norm(table). Returns the table.
// kFirst: the launch's first part, which awaits the launch before.
template <bool kFirst, bool kIsProduct, class G, class Row, class Norm>
__device__ __forceinline__ const RowInfo* formula_sums(Matmul<G>& matmul, const FormulaTile<G>& tile, Row&& row,
                                                       Norm&& norm) {
  if constexpr (!kFirst) simt::sync_block();  // shared memory is the part's before until all have read it
  if constexpr (kIsProduct) matmul.prefetch_weights();

  RowInfo* table = matmul.table();
  bool nonzero = false;
  if (simt::thread_x() < G::kBatch) {
    const RowInfo info = row(tile.first_row + simt::thread_x());
    nonzero = info.source[0] != nullptr;
    table[simt::thread_x()] = info;
  }
  nonzero = simt::sync_block_or(nonzero);
  if constexpr (kFirst) {
    simt::pdl_wait();
    simt::pdl_launch_dependents();
  }

  if constexpr (kIsProduct) {
    typename G::Accumulators acc;
    matmul.run(nonzero, acc);
    matmul.store_sums(acc);
  } else {
    norm(table);
  }
  return table;
}

// Element `index` of an array of the dtype or of the arithmetic type.
template <class T>
__device__ __forceinline__ auto formula_load(const void* array, int64_t index) {
  return simt::to_float(static_cast<const T*>(array)[index]);
}
template <class T, class V>
__device__ __forceinline__ void formula_store(void* array, int64_t index, V value) {
  static_cast<T*>(array)[index] = simt::from_float<T>(value);
}

// The row [H] that a reset of batch row b puts into a state before the step; null: zeros.
template <class T, class G>
__device__ __forceinline__ const T* formula_reset_row(const FormulaLayer& p, const FormulaTile<G>& tile, int state,
                                                      int64_t step, int64_t b) {
  return static_cast<const T*>(reset_row(p.reset_states[state], time_of_step(p.seq, step, tile.dir), tile.dir, b));
}
// Its unit of element e.
template <class T, class G>
__device__ __forceinline__ auto formula_reset_state(const FormulaLayer& p, const FormulaTile<G>& tile, int state,
                                                    int64_t step, int e) {
  using Value = decltype(formula_load<T>(nullptr, 0));
  const T* const row = formula_reset_row<T>(p, tile, state, step, tile.first_row + FormulaTile<G>::batch_of(e));
  return row ? formula_load<T>(row, tile.unit(e)) : Value(0);
}

}  // namespace fused_rnn::cuda
