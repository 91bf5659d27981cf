// What is left of a backward step when its product has been made: the step kernels' pointwise part (step/backward.cuh) with
// sums from memory. Blocks, threads and shared memory are those of pointwise_forward.cuh.
//
// Where the rows of a step do not lie beside each other in d_gates, or h0's gradient begins at another step for each row,
// every row's latest d_gates are kept in s.d_gates: a row that takes part in no earlier step leaves there what d_h0 needs.
#pragma once
#include "cuda/gemm/pointwise_forward.cuh"
#include "cuda/gemm/pointwise_kernels.h"
#include "cuda/step/backward.cuh"

namespace fused_rnn::cuda {

template <class G>
__global__ void __launch_bounds__(G::kThreads) pointwise_backward_kernel(const PointwiseBackwardStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using C = DeviceCell<G::kCell>;
  const BackwardStep& step = s.step;
  const BackwardParams& p = step.p;
  const PointwisePlace<G> at;
  auto* table = reinterpret_cast<RowInfo*>(simt::dynamic_smem());
  if (simt::thread_x() < G::kBatch) {
    int64_t next_row;
    bool next_reset;
    RowInfo info = backward_row(p.seq, p.modifier, step.step, at.dir, at.first_row + simt::thread_x(), next_row, next_reset);
    if (info.flags & kActive) {
      info.source[0] = p.d_h ? p.d_h : next_gate_gradient<Storage>(p, at.dir, info, next_row, next_reset);
    }
    table[simt::thread_x()] = info;
  }
  simt::sync_block();

  const BackwardElements<G> elements{step, table, at.dir, at.first_unit, at.first_row};
  const auto slot_of = [&](int gate) {
    return static_cast<Storage*>(s.d_gates) + ((at.dir * p.seq.B + at.row()) * C::kGates + gate) * p.H + at.unit();
  };
  // Where it is zero there may have been no product.
  const auto product = [&](int) {
    if (!table[at.row_in_tile].source[0]) return Acc(0);
    return static_cast<const Acc*>(s.sums)[(at.dir * p.seq.B + at.row()) * p.H + at.unit()];
  };
  const auto keep = [&](int, const Acc(&d)[C::kSlots]) {
    if (!s.d_gates) return;
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) *slot_of(g) = simt::from_float<Storage>(d[C::kSlots - C::kGates + g]);
  };
  elements.finish(0, elements.load(0), elements.load_carry(0), product, keep);
  // Rows whose turn comes later begin with zeros, which nobody adds up.
  if (!s.d_gates || step.step != p.seq.T - 1 || !elements.exists(0) || table[at.row_in_tile].flags & kActive) return;
#pragma unroll
  for (int g = 0; g < C::kGates; ++g) *slot_of(g) = simt::from_float<Storage>(Acc(0));
}

// The total gradient of h, of a projected LSTM or at step -1, from the product in `sums`.
template <class G>
__global__ void __launch_bounds__(G::kThreads) pointwise_state_grad_kernel(const PointwiseBackwardStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  const BackwardParams& p = s.step.p;
  const PointwisePlace<G> at;
  auto* table = reinterpret_cast<RowInfo*>(simt::dynamic_smem());
  if (simt::thread_x() < G::kBatch) {
    const int64_t b = at.first_row + simt::thread_x();
    int64_t next_row;
    bool next_reset;
    RowInfo info = backward_row(p.seq, p.modifier, s.step.step, at.dir, b, next_row, next_reset);
    info.source[0] = next_gate_gradient<Storage>(p, at.dir, info, next_row, next_reset);
    table[simt::thread_x()] = info;
  }
  simt::sync_block();
  const RowInfo& info = table[at.row_in_tile];
  const int64_t b = at.row(), unit = at.unit(), place = (at.dir * p.seq.B + b) * p.P + unit;
  if (unit >= p.P || !(info.flags & kExists)) return;
  const Acc sum = info.source[0] ? static_cast<const Acc*>(s.sums)[place] : Acc(0);
  const Acc dh = finish_state_gradient<Storage>(s.step, at.dir, b, unit, info, sum);
  if (s.d_h) static_cast<Storage*>(s.d_h)[place] = simt::from_float<Storage>(dh);
}

}  // namespace fused_rnn::cuda
