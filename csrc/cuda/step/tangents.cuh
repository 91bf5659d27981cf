// One step of a layer's tangents (Primal in core/params.h). ' marks a tangent:
//
//   a'[t] = x'[t] W_ih^T + b_ih' + h'[t-1] W_hh^T + b_hh' + source[t]
//   gates'[t], h'[t], c'[t]: cells.h on dual numbers (core/dual.h), whose values are those that forward has saved
//
// The work is divided as in forward.cuh, whose kernel this is but for the pointwise part. The first two terms are in `gates`
// on entry. With a projection h'[t] = hidden' W_hr^T + source_y[t].
#pragma once
#include "core/dual.h"
#include "cuda/step/forward.cuh"

namespace fused_rnn::cuda {

// A row of a state before the step of an active row; null: zeros. after: the state after the row's previous step; first: its
// initial state, or null; put: what resets put there.
template <class Storage>
__device__ __forceinline__ const Storage* state_before(const RowInfo& info, const ResetState& put, int64_t t, int dir,
                                                       int64_t b, const void* after, const void* first) {
  const void* row = first;
  if (info.flags & kHasPrevious) row = after;
  if (info.flags & kReset) row = reset_row(put, t, dir, b);
  return static_cast<const Storage*>(row);
}

// Rows of h and c before a step of row b; p: Primal, ForwardParams or BackwardParams, of a layer of these sizes.
template <class Storage, class P>
__device__ __forceinline__ const Storage* h_before(const P& p, const Sequence& seq, int64_t step, int D, int64_t size,
                                                   const RowInfo& info, int dir, int64_t b) {
  const auto* first = static_cast<const Storage*>(p.h0);
  return state_before<Storage>(info, p.modifier.h, time_of_step(seq, step, dir), dir, b,
                               static_cast<const Storage*>(p.y) + (info.other * D + dir) * size,
                               first ? first + (dir * seq.B + b) * size : nullptr);
}
template <class Storage, class P>
__device__ __forceinline__ const Storage* c_before(const P& p, const Sequence& seq, int64_t step, int64_t size,
                                                   const RowInfo& info, int dir, int64_t b) {
  const auto* first = static_cast<const Storage*>(p.c0);
  return state_before<Storage>(info, p.modifier.c, time_of_step(seq, step, dir), dir, b,
                               static_cast<const Storage*>(p.cs) + (dir * seq.N + info.other) * size,
                               first ? first + (dir * seq.B + b) * size : nullptr);
}

// Two rows, or zeros where one is null.
template <class Storage>
__device__ __forceinline__ Dual<Storage> dual_at(const Storage* value, const Storage* tangent, int64_t unit) {
  return {value ? value[unit] : Storage(0), tangent ? tangent[unit] : Storage(0)};
}

// The pointwise part of a step of tangents, for the elements of one thread.
template <class G>
struct TangentElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using C = DeviceCell<G::kCell>;
  static_assert(std::is_same_v<Storage, Acc>, "tangents are of float32 and float64 alone");

  const TangentStep& s;
  const RowInfo* table;
  int dir;
  int64_t first_unit, first_row;

  __device__ __forceinline__ void finish(int e) const {
    const ForwardParams& p = s.p;
    const int index = simt::thread_x() + e * G::kThreads, in_tile = index % G::kUnits, batch = index / G::kUnits;
    const RowInfo& info = table[batch];
    const int64_t unit = first_unit + in_tile, b = first_row + batch;
    if (unit >= p.H || !(info.flags & kExists)) return;
    const bool active = info.flags & kActive;
    Dual<Acc> a[C::kSlots], h(0), c(0);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) a[slot] = Dual<Acc>(0);
    if (active) {
      load(info, unit, in_tile, batch, a);
      Dual<Acc> h_prev(0), c_prev(0);
      if constexpr (C::kReadsH) {
        h_prev = dual_at(h_before<Storage>(s.primal, p.seq, s.step, p.D, p.P, info, dir, b),
                         static_cast<const Storage*>(info.source[0]), unit);
      }
      if constexpr (C::kHasC) {
        c_prev = dual_at(c_before<Storage>(s.primal, p.seq, s.step, p.H, info, dir, b),
                         c_before<Storage>(p, p.seq, s.step, p.H, info, dir, b), unit);
      }
      C::tangents(p.cell, a);
      C::states(a, h_prev, c_prev, h, c);
    }
    store(info, unit, b, a, h.tangent, c.tangent);
  }

  // Saved values, with the tangents of the accumulators.
  __device__ __forceinline__ void load(const RowInfo& info, int64_t unit, int in_tile, int batch,
                                       Dual<Acc> (&a)[C::kSlots]) const {
    const ForwardParams& p = s.p;
    const int64_t place = (dir * p.seq.N + info.row) * C::kSlots * p.H + unit;
    const auto* values = static_cast<const Storage*>(s.primal.gates);
    const auto* source = static_cast<const Storage*>(s.primal.source);
    const auto* projection = static_cast<const Storage*>(p.gates);
    const auto* b_hh = static_cast<const Storage*>(dir ? p.weights[1].b_hh : p.weights[0].b_hh);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      if constexpr (C::kSaved > 0) {
        a[slot].value = values[place + slot * p.H];
      } else {
        a[slot].value = static_cast<const Storage*>(s.primal.y)[(info.row * p.D + dir) * p.P + unit];
      }
      if (source) a[slot].tangent = source[place + slot * p.H];
    }
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      a[g].tangent = a[g].tangent + projection[place + g * p.H];
      Acc& recurrent = a[C::recurrent_slot(g)].tangent;
      recurrent = recurrent + Matmul<G>::sum(g, in_tile, batch);
      if (b_hh) recurrent = recurrent + b_hh[g * p.H + unit];
    }
  }

  __device__ __forceinline__ void store(const RowInfo& info, int64_t unit, int64_t b, const Dual<Acc> (&a)[C::kSlots], Acc h,
                                        Acc c) const {
    const ForwardParams& p = s.p;
    const int64_t state = (dir * p.seq.B + b) * p.H + unit;
    const bool active = info.flags & kActive;
    if (s.hidden) {
      static_cast<Storage*>(s.hidden)[state] = h;
    } else {
      store_output<Storage>(p, dir, b, unit, info, h);
    }
    if constexpr (C::kHasC) {
      if (info.flags & kNever)
        static_cast<Storage*>(p.c_n)[state] = p.c0 ? static_cast<const Storage*>(p.c0)[state] : Acc(0);
      if (active && !(info.flags & kHasNext)) static_cast<Storage*>(p.c_n)[state] = c;
    }
    if (!active && p.seq.offsets) return;
    if constexpr (C::kHasC) static_cast<Storage*>(p.cs)[(dir * p.seq.N + info.row) * p.H + unit] = c;
    if constexpr (C::kSaved > 0) {
      auto* gates = static_cast<Storage*>(p.gates) + (dir * p.seq.N + info.row) * C::kSlots * p.H + unit;
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) gates[slot * p.H] = a[slot].tangent;
    }
  }
};

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) tangent_kernel(const TangentStep s) {
  using Storage = typename G::Storage;
  const ForwardParams& p = s.p;
  const int dir = simt::block_z();
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  const Operand<Storage> operands[1] = {
      {static_cast<const Storage*>(dir ? p.weights[1].w_hh.data : p.weights[0].w_hh.data), p.H, p.P, s.copy_state}};
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();

  RowInfo* table = matmul.table();
  bool nonzero = false;
  if (simt::thread_x() < G::kBatch) {
    const int64_t b = first_row + simt::thread_x();
    RowInfo info = forward_row(p.seq, p.modifier, s.step, dir, b);
    if (info.flags & kActive) info.source[0] = h_before<Storage>(p, p.seq, s.step, p.D, p.P, info, dir, b);
    nonzero = info.source[0] != nullptr;
    table[simt::thread_x()] = info;
  }
  nonzero = simt::sync_block_or(nonzero);
  simt::pdl_wait();
  simt::pdl_launch_dependents();

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
  const TangentElements<G> elements{s, table, dir, first_unit, first_row};
#pragma unroll(G::kElements <= 4 ? G::kElements : 4)
  for (int e = 0; e < G::kElements; ++e) elements.finish(e);
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) project_tangent_kernel(const TangentStep s) {
  const int dir = simt::block_z();
  const auto* source = static_cast<const typename G::Storage*>(s.primal.source_y);  // [D, N, P]
  project<G>(s, [&](typename G::Acc sum, int64_t row, int64_t unit) {
    return source ? sum + source[(dir * s.p.seq.N + row) * s.p.P + unit] : sum;
  });
}

}  // namespace fused_rnn::cuda
