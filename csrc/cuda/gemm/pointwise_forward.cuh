// What is left of a forward step when its product has been made: the step kernels' pointwise part (step/forward.cuh) with
// sums from memory.
//
// A block owns 32 units of 8 batch rows in one direction (blockIdx.z). A warp has one of the rows and a thread one unit of
// it, so accesses of a warp are neighbours. Shared memory: the table of rows, which 8 threads fill in before the only
// barrier.
#pragma once
#include "cuda/gemm/pointwise_kernels.h"
#include "cuda/step/forward.cuh"

namespace fused_rnn::cuda {

// The place of a thread's element.
template <class G>
struct PointwisePlace {
  int dir, unit_in_tile, row_in_tile;
  int64_t first_unit, first_row;

  __device__ __forceinline__ PointwisePlace()
      : dir(simt::block_z()),
        unit_in_tile(simt::thread_x() % G::kUnits),
        row_in_tile(simt::thread_x() / G::kUnits),
        first_unit(static_cast<int64_t>(simt::block_y()) * G::kUnits),
        first_row(static_cast<int64_t>(simt::block_x()) * G::kBatch) {
    static_assert(G::kElements == 1);
  }
  __device__ __forceinline__ int64_t unit() const { return first_unit + unit_in_tile; }
  __device__ __forceinline__ int64_t row() const { return first_row + row_in_tile; }
};

// Writes what the step after `step` multiplies of row b (zeros where the row takes no part in it), given what this step made
// of it; step -1: before the first one.
template <class Storage, class Acc>
__device__ __forceinline__ void store_next_state(const ForwardParams& p, int64_t step, int dir, int64_t b, int64_t unit,
                                                 const RowInfo& info, Acc h, void* states) {
  const int64_t t = time_of_step(p.seq, step + 1, dir), place = (dir * p.seq.B + b) * p.P + unit;
  Storage next = simt::from_float<Storage>(Acc(0));
  if (is_active(p.seq, t, b)) {
    if (is_reset(p.modifier, row_of(p.seq, t, b))) {
      const auto* row = static_cast<const Storage*>(reset_row(p.modifier.h, t, dir, b));
      if (row) next = row[unit];
    } else if (info.flags & kActive) {
      next = simt::from_float<Storage>(h);
    } else if (p.h0) {
      next = static_cast<const Storage*>(p.h0)[place];
    }
    if (p.modifier.product) {
      const Acc factor = simt::to_float(static_cast<const Storage*>(p.modifier.product)[place]);
      next = simt::from_float<Storage>(simt::to_float(next) * factor);
    }
  }
  static_cast<Storage*>(states)[place] = next;
}

template <class G>
__global__ void __launch_bounds__(G::kThreads) pointwise_forward_kernel(const PointwiseForwardStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  const ForwardStep& step = s.step;
  const ForwardParams& p = step.p;
  const PointwisePlace<G> at;
  auto* table = reinterpret_cast<RowInfo*>(simt::dynamic_smem());
  if (simt::thread_x() < G::kBatch) {
    const int64_t b = at.first_row + simt::thread_x();
    RowInfo info = forward_row(p.seq, p.modifier, step.step, at.dir, b);
    if (info.flags & kActive) info.source[0] = previous_state<Storage, G::kModified>(p, step.step, at.dir, b, info);
    table[simt::thread_x()] = info;
  }
  simt::sync_block();

  ForwardElements<G> elements{step, table, at.dir, at.first_unit, at.first_row, {}, {}, {}};
  elements.load_projection();
  elements.load_state();
  // Where the state is zeros, there may have been no product.
  const auto sum = [&](int slot, int unit, int batch) {
    if (!table[batch].source[0]) return Acc(0);
    const int64_t row = at.dir * p.seq.B + at.first_row + batch;
    return static_cast<const Acc*>(s.sums)[(row * G::kSlots + slot) * p.H + at.first_unit + unit];
  };
  elements.finish(sum, [&](int64_t b, int64_t unit, const RowInfo& info, Acc h) {
    store_output<Storage>(p, at.dir, b, unit, info, h);
    if (s.states) store_next_state<Storage>(p, step.step, at.dir, b, unit, info, h, s.states);
  });
}

// The outputs of a projection, which a product has left in `sums`.
template <class G>
__global__ void __launch_bounds__(G::kThreads) pointwise_project_kernel(const PointwiseForwardStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  const ForwardParams& p = s.step.p;
  const PointwisePlace<G> at;
  auto* table = reinterpret_cast<RowInfo*>(simt::dynamic_smem());
  if (simt::thread_x() < G::kBatch) {
    table[simt::thread_x()] = forward_row(p.seq, p.modifier, s.step.step, at.dir, at.first_row + simt::thread_x());
  }
  simt::sync_block();
  const RowInfo& info = table[at.row_in_tile];
  const int64_t b = at.row(), unit = at.unit();
  if (unit >= p.P || !(info.flags & kExists)) return;
  const Acc h = static_cast<const Acc*>(s.sums)[(at.dir * p.seq.B + b) * p.P + unit];
  store_output<Storage>(p, at.dir, b, unit, info, h);
  if (s.states) store_next_state<Storage>(p, s.step.step, at.dir, b, unit, info, h, s.states);
}

template <class G>
__global__ void __launch_bounds__(G::kThreads) first_states_kernel(const PointwiseForwardStep s) {
  const ForwardParams& p = s.step.p;
  const PointwisePlace<G> at;
  if (at.unit() >= p.P || at.row() >= p.seq.B) return;
  store_next_state<typename G::Storage>(p, -1, at.dir, at.row(), at.unit(), RowInfo{}, typename G::Acc(0), s.states);
}

}  // namespace fused_rnn::cuda
