// One backward step of one layer on dual numbers (DualBackwardParams in core/params.h). ' marks a tangent:
//
//   dh[t]  = dy[t]  + d_rg[next]  W_hh + carry
//   dh'[t] = dy'[t] + d_rg'[next] W_hh + d_rg[next] W_hh' + carry'
//
// and d_gates[t], d_gates'[t] by cells.h on dual numbers (core/dual.h); the rest is as in backward.cuh.
//   dual_backward_kernel    these (without projection), or dh and dh' of d_h, d_h' and W_hr alike (with one)
//   dual_state_grad_kernel  dh and dh' of a projected LSTM, to both d_h; and d_h0', the same sum at "step -1"
// A block owns kUnits units of kBatch / 2 batch rows in one direction (blockIdx.z). The first half of the product's rows are
// the values of these batch rows, the second half their tangents: the first phase multiplies tangents by W_hh', where there
// is one, and values by nothing; the second both by W_hh. A thread finishes kPairs pairs of a unit and a batch row.
#pragma once
#include "cuda/step/backward.cuh"
#include "cuda/step/tangents.cuh"

namespace fused_rnn::cuda {

constexpr int kValue = 0, kTangent = 1;

template <class G>
struct DualTile {
  static constexpr int kRows = G::kBatch / 2;
  static constexpr int kPairs = (G::kUnits * kRows + G::kThreads - 1) / G::kThreads;
  static_assert(G::kOperands == 2 && G::kBatch % 2 == 0);
};

// The rows that the product of a step multiplies, into the table: source(half, info, next_row, next_reset) is the row of a
// half, or null. wants_values: the sums of the values count. Returns whether the block has any row that is not zero.
template <class G, class Source>
__device__ __forceinline__ bool fill_dual_table(const DualStep& s, RowInfo* table, int dir, int64_t first_row,
                                                bool wants_values, const Source& source) {
  constexpr int kRows = DualTile<G>::kRows;
  bool nonzero = false;
  const int place = simt::thread_x();
  if (place < G::kBatch) {
    int64_t next_row;
    bool next_reset;
    const BackwardParams& p = s.p[kValue];
    RowInfo info = backward_row(p.seq, p.modifier, s.step, dir, first_row + place % kRows, next_row, next_reset);
    const void* const value = source(s.p[kValue], info, next_row, next_reset);
    if (place < kRows) {
      info.source[1] = wants_values ? value : nullptr;
    } else {
      info.source[0] = value;
      info.source[1] = source(s.p[kTangent], info, next_row, next_reset);
    }
    nonzero = info.source[0] || info.source[1];
    table[place] = info;
  }
  return simt::sync_block_or(nonzero);
}

// W' and W [k, units] as the phases of the product take them.
template <class Storage>
__device__ __forceinline__ void dual_operands(const DualStep& s, const void* tangent, const void* value, int64_t units,
                                              int64_t k, Operand<Storage> (&operands)[2]) {
  operands[0] = {static_cast<const Storage*>(tangent), units, tangent ? k : 0, s.copy_bytes};
  operands[1] = {static_cast<const Storage*>(value), units, k, s.copy_bytes};
}

// The pointwise part of a dual backward step, for the pairs of one thread.
template <class G>
struct DualElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using C = DeviceCell<G::kCell>;
  static constexpr bool kHasCarry = C::kHasC || C::kReadsH;
  static_assert(std::is_same_v<Storage, Acc>, "dual numbers are of float32 and float64 alone");

  const DualStep& s;
  const RowInfo* table;
  int dir;
  int64_t first_unit, first_row;

  static __device__ __forceinline__ const Acc* at(const void* tensor, int64_t index) {
    return tensor ? static_cast<const Acc*>(tensor) + index : nullptr;
  }
  // Of what both halves have, or zeros where it is null.
  static __device__ __forceinline__ Dual<Acc> both(const void* value, const void* tangent, int64_t index) {
    return dual_at<Acc>(at(value, index), at(tangent, index), 0);
  }

  __device__ __forceinline__ void finish(int pair) const {
    const BackwardParams &value = s.p[kValue], &tangent = s.p[kTangent];
    const int index = simt::thread_x() + pair * G::kThreads, in_tile = index % G::kUnits, batch = index / G::kUnits;
    const int64_t unit = first_unit + in_tile, b = first_row + batch;
    if (batch >= DualTile<G>::kRows || unit >= value.H || !(table[batch].flags & kExists)) return;
    const RowInfo& info = table[batch];
    const int64_t state = (dir * value.seq.B + b) * value.H + unit;
    if constexpr (C::kHasC) {
      if (info.flags & kNever) store_d_c0(state, tangent.dc_n ? *at(tangent.dc_n, state) : Acc(0));
    }
    const bool active = info.flags & kActive;
    if (!active && value.seq.offsets) return;
    Dual<Acc> d[C::kSlots];
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) d[slot] = Dual<Acc>(0);
    if (active) step(info, unit, b, state, total(info, in_tile, batch, unit, state), d);
    const int64_t place = (dir * value.seq.N + info.row) * C::kSlots * value.H + unit;
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      static_cast<Acc*>(value.d_gates)[place + slot * value.H] = d[slot].value;
      static_cast<Acc*>(tangent.d_gates)[place + slot * value.H] = d[slot].tangent;
    }
  }

  // The total gradient of h.
  __device__ __forceinline__ Dual<Acc> total(const RowInfo& info, int in_tile, int batch, int64_t unit,
                                             int64_t state) const {
    const BackwardParams &value = s.p[kValue], &tangent = s.p[kTangent];
    const Dual<Acc> sum{Matmul<G>::sum(0, in_tile, batch), Matmul<G>::sum(0, in_tile, DualTile<G>::kRows + batch)};
    if (value.P != value.H) return sum;  // the whole of it comes from the product
    Dual<Acc> dh = sum + both(value.dy, tangent.dy, (info.row * value.D + dir) * value.P + unit);
    if (!(info.flags & kHasNext)) {
      dh = dh + both(value.dh_n, tangent.dh_n, state);
    } else if (C::kReadsH) {
      dh = dh + both(s.carry[kValue], s.carry[kTangent], state);
    }
    if (value.d_h) dh.value = *at(value.d_h, (dir * value.seq.N + info.row) * value.P + unit);
    return dh;
  }

  __device__ __forceinline__ void step(const RowInfo& info, int64_t unit, int64_t b, int64_t state, const Dual<Acc>& dh,
                                       Dual<Acc> (&d)[C::kSlots]) const {
    const BackwardParams &value = s.p[kValue], &tangent = s.p[kTangent];
    const int64_t row = dir * value.seq.N + info.row;  // of [D, N, .]
    Dual<Acc> a[C::kSlots], h_prev(0), c_prev(0), c(0), h(0), dc(0);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      a[slot] = C::kSaved > 0 ? both(value.gates, tangent.gates, (row * C::kSlots + slot) * value.H + unit) : Dual<Acc>(0);
    }
    if constexpr (C::kSaved == 0) h = both(value.y, tangent.y, (info.row * value.D + dir) * value.P + unit);
    if constexpr (C::kReadsH) {
      h_prev = dual_at(h_before<Storage>(value, value.seq, s.step, value.D, value.P, info, dir, b),
                       h_before<Storage>(tangent, value.seq, s.step, value.D, value.P, info, dir, b), unit);
    }
    if constexpr (C::kHasC) {
      c_prev = dual_at(c_before<Storage>(value, value.seq, s.step, value.H, info, dir, b),
                       c_before<Storage>(tangent, value.seq, s.step, value.H, info, dir, b), unit);
      c = both(value.cs, tangent.cs, row * value.H + unit);
      dc = info.flags & kHasNext ? both(s.carry[kValue], s.carry[kTangent], state) : both(value.dc_n, tangent.dc_n, state);
      dc = dc + both(value.d_cs, tangent.d_cs, row * value.H + unit);
    }
    const Dual<Acc> bypass = C::backward(value.cell, a, h_prev, c_prev, c, h, dh, dc, d);
    if constexpr (kHasCarry) hand_on(info, row * value.H + unit, state, C::kHasC ? dc : bypass);
  }

  // What passes by the weights goes to the step before, or to the state that a reset has put there.
  __device__ __forceinline__ void hand_on(const RowInfo& info, int64_t place, int64_t state, Dual<Acc> out) const {
    const BackwardParams& tangent = s.p[kTangent];
    if (info.flags & kReset) {
      void* const of_reset = C::kHasC ? tangent.d_reset_c : tangent.d_reset_h;
      if (of_reset) static_cast<Acc*>(of_reset)[place] = out.tangent;
      out = Dual<Acc>(0);
    }
    static_cast<Acc*>(s.carry[kValue])[state] = out.value;
    static_cast<Acc*>(s.carry[kTangent])[state] = out.tangent;
    if constexpr (C::kHasC) {
      if (!(info.flags & kHasPrevious)) store_d_c0(state, out.tangent);
    }
  }

  __device__ __forceinline__ void store_d_c0(int64_t state, Acc tangent) const {
    if (s.p[kTangent].d_c0) static_cast<Acc*>(s.p[kTangent].d_c0)[state] = tangent;
  }
};

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) dual_backward_kernel(const DualStep s) {
  using Storage = typename G::Storage;
  const BackwardParams& value = s.p[kValue];
  const int dir = simt::block_z();
  const bool projected = value.P != value.H;
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * DualTile<G>::kRows;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  const Weights &of_value = value.weights[dir], &of_tangent = s.p[kTangent].weights[dir];
  Operand<Storage> operands[2];
  dual_operands(s, projected ? of_tangent.w_hr.data : of_tangent.w_hh.data,
                projected ? of_value.w_hr.data : of_value.w_hh.data, value.H,
                projected ? value.P : gate_count(G::kCell) * value.H, operands);
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();
  const bool nonzero = fill_dual_table<G>(
      s, matmul.table(), dir, first_row, /*wants_values=*/projected || !value.d_h,
      [&](const BackwardParams& p, const RowInfo& info, int64_t next_row, bool next_reset) -> const Storage* {
        if (!(info.flags & kActive)) return nullptr;
        if (projected) return static_cast<const Storage*>(p.d_h) + (dir * p.seq.N + info.row) * p.P;
        return next_gate_gradient<Storage>(p, dir, info, next_row, next_reset);
      });
  simt::pdl_wait();
  simt::pdl_launch_dependents();

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
  const DualElements<G> elements{s, matmul.table(), dir, first_unit, first_row};
  constexpr int kPairs = DualTile<G>::kPairs;
#pragma unroll(kPairs <= 4 ? kPairs : 4)
  for (int pair = 0; pair < kPairs; ++pair) elements.finish(pair);
}

// The code does not depend on the cell of G: gates are counted at run time.
template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) dual_state_grad_kernel(const DualStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  const BackwardParams& value = s.p[kValue];
  const int dir = simt::block_z();
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * DualTile<G>::kRows;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  Operand<Storage> operands[2];
  dual_operands(s, s.p[kTangent].weights[dir].w_hh.data, value.weights[dir].w_hh.data, value.P,
                gate_count(value.cell) * value.H, operands);
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();
  const RowInfo* table = matmul.table();
  const bool nonzero = fill_dual_table<G>(
      s, matmul.table(), dir, first_row, /*wants_values=*/s.step >= 0,
      [&](const BackwardParams& p, const RowInfo& info, int64_t next_row, bool next_reset) -> const Storage* {
        return next_gate_gradient<Storage>(p, dir, info, next_row, next_reset);
      });
  simt::pdl_wait();
  simt::pdl_launch_dependents();

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
  constexpr int kPairs = DualTile<G>::kPairs, kRows = DualTile<G>::kRows;
#pragma unroll(kPairs <= 4 ? kPairs : 4)
  for (int pair = 0; pair < kPairs; ++pair) {
    const int index = simt::thread_x() + pair * G::kThreads, unit = index % G::kUnits, batch = index / G::kUnits;
    if (batch >= kRows || first_unit + unit >= value.P || !(table[batch].flags & kExists)) continue;
    const RowInfo& info = table[batch];
    const int64_t state = (dir * value.seq.B + first_row + batch) * value.P + first_unit + unit;
    const bool active = info.flags & kActive, at_start = s.step < 0;
#pragma unroll
    for (int half = kValue; half <= kTangent; ++half) {
      if (at_start && half == kValue) continue;
      const BackwardParams& p = s.p[half];
      Acc dh = matmul.sum(0, unit, half * kRows + batch);
      if (!(info.flags & kHasNext)) {
        if (p.dh_n) dh += static_cast<const Acc*>(p.dh_n)[state];
      } else if (traits_of(p.cell).reads_h) {
        dh += static_cast<const Acc*>(s.carry[half])[state];
      }
      if (at_start) {
        static_cast<Acc*>(p.d_h0)[state] = dh;
        continue;
      }
      if (active && p.dy) dh += static_cast<const Acc*>(p.dy)[(info.row * p.D + dir) * p.P + first_unit + unit];
      if (active || !p.seq.offsets) {
        static_cast<Acc*>(p.d_h)[(dir * p.seq.N + info.row) * p.P + first_unit + unit] = active ? dh : Acc(0);
      }
    }
  }
}

}  // namespace fused_rnn::cuda
