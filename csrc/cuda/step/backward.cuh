// One backward step of one layer. With "next" and "previous" in scan order, row b active at t has
//   dh[t] = dy[t] + d_rg[next] W_hh + carry     (d_rg: the recurrent slots of d_gates; carry: GRU's part that bypasses W_hh)
// where the last two terms are 0 if the state was reset before `next`, and dh_n stands for them if the row ends at t.
// kBackwardModified is kBackward with the options of steps (modified.cuh), the gradients of every c, and those of what
// resets put into a state, which it stores in place of carrying them on.
//   backward_kernel    dh (without projection) or d_h W_hr (with), then the cell's derivative: d_gates[t], carry, d_c0
//   state_grad_kernel  dh of a projected LSTM, to d_h[t]; and d_h0, which is the same sum at "step -1"
// A block owns kUnits units of kBatch batch rows in one direction (blockIdx.z). A thread finishes kElements (unit, row)
// pairs.
#pragma once
#include "cuda/device/cell_device.cuh"
#include "cuda/step/forward.cuh"
#include "cuda/step/kernels.h"
#include "cuda/step/matmul.cuh"
#include "cuda/step/modified.cuh"
#include "cuda/step/rows.cuh"

namespace fused_rnn::cuda {

// Row of the recurrent slots of d_gates at the next step; null: its product with W_hh is zero.
template <class Storage>
__device__ __forceinline__ const Storage* next_gate_gradient(const BackwardParams& p, int dir, const RowInfo& info,
                                                             int64_t next_row, bool next_reset) {
  if (!(info.flags & kHasNext) || next_reset) return nullptr;
  const int slots = slot_count(p.cell), gates = gate_count(p.cell);
  return static_cast<const Storage*>(p.d_gates) + ((dir * p.seq.N + next_row) * slots + slots - gates) * p.H;
}

// The pointwise part of a backward step, for the elements of one thread.
template <class G>
struct BackwardElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using C = DeviceCell<G::kCell>;
  static constexpr bool kHasCarry = C::kHasC || C::kReadsH;
  static constexpr int kSaved = G::kModified ? C::kSlots : C::kSaved;
  // Operands of an element that do not depend on the preceding launch.
  struct Element {
    Acc a[C::kSlots];
    Acc dh, h_prev, h, c_prev, c;
  };

  const BackwardStep& s;
  const RowInfo* table;
  int dir;
  int64_t first_unit, first_row;

  static __device__ __forceinline__ int unit_of(int e) { return (simt::thread_x() + e * G::kThreads) % G::kUnits; }
  static __device__ __forceinline__ int batch_of(int e) { return (simt::thread_x() + e * G::kThreads) / G::kUnits; }
  __device__ __forceinline__ bool exists(int e) const {
    return batch_of(e) < G::kBatch && first_unit + unit_of(e) < s.p.H && table[batch_of(e)].flags & kExists;
  }
  __device__ __forceinline__ int64_t state_index(int e) const {
    return (dir * s.p.seq.B + first_row + batch_of(e)) * s.p.H + first_unit + unit_of(e);
  }
  __device__ __forceinline__ int64_t gate_index(int e, int64_t row) const {
    return (dir * s.p.seq.N + row) * C::kSlots * s.p.H + first_unit + unit_of(e);
  }
  // Element `unit` of row `row` of an output-shaped tensor [N, D, P].
  __device__ __forceinline__ Acc output(const void* tensor, int64_t row, int e) const {
    return simt::to_float(static_cast<const Storage*>(tensor)[(row * s.p.D + dir) * s.p.P + first_unit + unit_of(e)]);
  }
  // [D, B, H], or zero.
  __device__ __forceinline__ Acc state(const void* tensor, int e) const {
    return tensor ? Acc(simt::to_float(static_cast<const Storage*>(tensor)[state_index(e)])) : Acc(0);
  }

  __device__ __forceinline__ Element load(int e) const {
    Element x{};
    if (!exists(e) || !(table[batch_of(e)].flags & kActive)) return x;
    const RowInfo& info = table[batch_of(e)];
    if (kSaved > 0 && reads_gates()) {
      const auto* gates = static_cast<const Storage*>(s.p.gates) + gate_index(e, info.row);
#pragma unroll
      for (int slot = 0; slot < kSaved; ++slot) x.a[slot] = simt::to_float(gates[slot * s.p.H]);
    } else {
      x.h = output(s.p.y, info.row, e);
    }
    if constexpr (G::kModified) {
      if (info.flags & kReset) load_reset_state(e, x);
    }
    const bool start_is_zero = info.flags & kReset;
    if constexpr (C::kReadsH) {
      if (!start_is_zero) x.h_prev = info.flags & kHasPrevious ? output(s.p.y, info.other, e) : state(s.p.h0, e);
    }
    if constexpr (C::kHasC) {
      const auto* cs = static_cast<const Storage*>(s.p.cs) + dir * s.p.seq.N * s.p.H + first_unit + unit_of(e);
      x.c = simt::to_float(cs[info.row * s.p.H]);
      if (!start_is_zero) {
        x.c_prev = info.flags & kHasPrevious ? Acc(simt::to_float(cs[info.other * s.p.H])) : state(s.p.c0, e);
      }
    }
    // With a projection the whole of dh comes from the product.
    if (!s.p.d_h) {
      if (s.p.dy) x.dh = output(s.p.dy, info.row, e);
      if (!(info.flags & kHasNext)) x.dh += state(s.p.dh_n, e);
    }
    return x;
  }

  // Whether forward has saved slots: of an RNN where steps are more than the cell's.
  __device__ __forceinline__ bool reads_gates() const {
    if constexpr (C::kSaved > 0) return true;
    return modifies_steps(s.p.modifier);
  }

  // The state that a reset has put before the step, where the cell's derivative reads it.
  __device__ __forceinline__ void load_reset_state(int e, Element& x) const {
    const int64_t t = time_of_step(s.p.seq, s.step, dir), b = first_row + batch_of(e), unit = first_unit + unit_of(e);
    if constexpr (C::kReadsH) {
      const auto* row = static_cast<const Storage*>(reset_row(s.p.modifier.h, t, dir, b));
      if (row) x.h_prev = simt::to_float(row[unit]);
    }
    if constexpr (C::kHasC) {
      const auto* row = static_cast<const Storage*>(reset_row(s.p.modifier.c, t, dir, b));
      if (row) x.c_prev = simt::to_float(row[unit]);
    }
  }

  // The derivative of a modified step, as C::backward's. row_index: of this row in [D, N, H].
  __device__ __forceinline__ Acc modified_backward(int e, const Element& x, int64_t row_index, Acc dh, Acc& dc,
                                                   Acc (&d)[C::kSlots]) const {
    const Modifier& options = s.p.modifier;
    StepModifier<Acc> m = step_modifier<Storage, Acc>(options, state_index(e));
    Acc c = x.c, h = x.h;
    if (modifies_steps(options)) {  // y and cs hold what zoneout has made of them
      h = m.raw = C::unclipped(x.a, x.h_prev, x.c_prev, m);
      c = m.clipped(m.raw);
    }
    const ZoneoutUnit<Acc> zoneout_h = zoneout_unit<Acc>(options.zoneout_h, row_index);
    const ZoneoutUnit<Acc> zoneout_c = zoneout_unit<Acc>(options.zoneout_c, row_index);
    if (C::kHasC && s.p.d_cs) dc += simt::to_float(static_cast<const Storage*>(s.p.d_cs)[row_index]);
    const Acc dc_kept = zoneout_c.to_before(dc);
    dc = zoneout_c.to_after(dc);
    const ModifiedKind<StepModifier<Acc>> cell{s.p.cell, m};
    const Acc bypass = C::backward(cell, x.a, x.h_prev, x.c_prev, c, h, zoneout_h.to_after(dh), dc, d);
    dc += dc_kept;
    return bypass + zoneout_h.to_before(dh);
  }

  // What passes by the weights goes to the step before, or to the state that a reset has put there.
  __device__ __forceinline__ void hand_on(int e, const RowInfo& info, int64_t row_index, Acc bypass, Acc dc) const {
    const bool reset = info.flags & kReset;
    if (reset && s.p.d_reset_h) static_cast<Storage*>(s.p.d_reset_h)[row_index] = simt::from_float<Storage>(bypass);
    if (reset && s.p.d_reset_c) static_cast<Storage*>(s.p.d_reset_c)[row_index] = simt::from_float<Storage>(dc);
    if (reset) bypass = dc = Acc(0);
    if (s.carry_h) static_cast<Acc*>(s.carry_h)[state_index(e)] = bypass;
    if constexpr (C::kHasC) {
      static_cast<Acc*>(s.carry)[state_index(e)] = dc;
      if (!(info.flags & kHasPrevious)) store_d_c0(e, dc);
    }
  }

  // The gradient that the next step left, for LSTM's c or for GRU's h.
  __device__ __forceinline__ Acc load_carry(int e) const {
    if constexpr (kHasCarry) {
      if (!exists(e)) return Acc(0);
      if (table[batch_of(e)].flags & kHasNext) return static_cast<const Acc*>(s.carry)[state_index(e)];
      if constexpr (C::kHasC) return state(s.p.dc_n, e);
    }
    return Acc(0);
  }

  // product: element e of the product. keep(e, d) takes the gradients of the pre-activations of a row that takes part.
  template <class Product, class Keep>
  __device__ __forceinline__ void finish(int e, const Element& x, Acc carry, const Product& product,
                                         const Keep& keep) const {
    if (!exists(e)) return;
    const RowInfo& info = table[batch_of(e)];
    if constexpr (C::kHasC) {
      if (info.flags & kNever) store_d_c0(e, state(s.p.dc_n, e));
    }
    if (!(info.flags & kActive) && s.p.seq.offsets) return;
    Acc d[C::kSlots] = {};
    if (info.flags & kActive) {
      Acc sum = product(e);
      if constexpr (G::kModified) {
        if (!s.p.d_h) sum *= factor_of_product(e);
        if (!C::kReadsH && s.carry_h && info.flags & kHasNext) sum += static_cast<const Acc*>(s.carry_h)[state_index(e)];
      }
      Acc dh = x.dh + sum, dc = carry;
      if constexpr (!C::kHasC) dh += carry;
      if constexpr (G::kModified) {
        const int64_t row_index = (dir * s.p.seq.N + info.row) * s.p.H + first_unit + unit_of(e);
        const Acc bypass = modified_backward(e, x, row_index, dh, dc, d);
        hand_on(e, info, row_index, bypass, dc);
      } else {
        const Acc bypass = C::backward(s.p.cell, x.a, x.h_prev, x.c_prev, x.c, x.h, dh, dc, d);
        if constexpr (kHasCarry) {
          const Acc out = info.flags & kReset ? Acc(0) : C::kHasC ? dc : bypass;
          static_cast<Acc*>(s.carry)[state_index(e)] = out;
          if (C::kHasC && !(info.flags & kHasPrevious)) store_d_c0(e, out);
        }
      }
      keep(e, d);
    }
    auto* d_gates = static_cast<Storage*>(s.p.d_gates) + gate_index(e, info.row);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) d_gates[slot * s.p.H] = simt::from_float<Storage>(d[slot]);
  }

  // Of the h that the next step multiplies with the recurrent weights.
  __device__ __forceinline__ Acc factor_of_product(int e) const {
    const auto* factors = static_cast<const Storage*>(s.p.modifier.product);  // [D, B, P], P == H
    return factors ? Acc(simt::to_float(factors[state_index(e)])) : Acc(1);
  }

  __device__ __forceinline__ void store_d_c0(int e, Acc value) const {
    static_cast<Storage*>(s.p.d_c0)[state_index(e)] = simt::from_float<Storage>(value);
  }
};

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) backward_kernel(const BackwardStep s) {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  // Elements are loaded ahead of the product where the registers allow it.
  constexpr bool kAhead = G::kElements <= 8;
  const int dir = simt::block_z();
  const bool projected = s.p.d_h != nullptr;
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  const Weights& weights = s.p.weights[dir];
  const Operand<Storage> operands[1] = {{static_cast<const Storage*>(projected ? weights.w_hr.data : weights.w_hh.data),
                                         s.p.H, projected ? s.p.P : gate_count(G::kCell) * s.p.H, s.copy_bytes}};
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();

  RowInfo* table = matmul.table();
  bool nonzero = false;
  if (simt::thread_x() < G::kBatch) {
    int64_t next_row;
    bool next_reset;
    RowInfo info = backward_row(s.p.seq, s.p.modifier, s.step, dir, first_row + simt::thread_x(), next_row, next_reset);
    if (info.flags & kActive) {
      info.source[0] = projected ? static_cast<const Storage*>(s.p.d_h) + (dir * s.p.seq.N + info.row) * s.p.P
                                 : next_gate_gradient<Storage>(s.p, dir, info, next_row, next_reset);
    }
    nonzero = info.source[0] != nullptr;
    table[simt::thread_x()] = info;
  }
  nonzero = simt::sync_block_or(nonzero);

  const BackwardElements<G> elements{s, table, dir, first_unit, first_row};
  typename BackwardElements<G>::Element ahead[kAhead ? G::kElements : 1];
  Acc carry[kAhead ? G::kElements : 1];
  if constexpr (kAhead) {
#pragma unroll
    for (int e = 0; e < G::kElements; ++e) ahead[e] = elements.load(e);
  }
  simt::pdl_wait();
  simt::pdl_launch_dependents();
  if constexpr (kAhead) {
#pragma unroll
    for (int e = 0; e < G::kElements; ++e) carry[e] = elements.load_carry(e);
  }

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
  using Elements = BackwardElements<G>;
  const auto product = [](int e) { return Matmul<G>::sum(0, Elements::unit_of(e), Elements::batch_of(e)); };
  const auto keep = [](int, const auto&) {};
#pragma unroll
  for (int e = 0; e < G::kElements; ++e) {
    if constexpr (kAhead) {
      elements.finish(e, ahead[e], carry[e], product, keep);
    } else {
      elements.finish(e, elements.load(e), elements.load_carry(e), product, keep);
    }
  }
}

// The total gradient of h of one unit of row b, from the product's part of it: to d_h, or at step -1 to d_h0.
template <class Storage, class Acc>
__device__ __forceinline__ Acc finish_state_gradient(const BackwardStep& s, int dir, int64_t b, int64_t unit,
                                                     const RowInfo& info, Acc dh) {
  const int64_t state = (dir * s.p.seq.B + b) * s.p.P + unit;
  if (s.p.modifier.product) dh *= simt::to_float(static_cast<const Storage*>(s.p.modifier.product)[state]);
  if (!(info.flags & kHasNext)) {
    if (s.p.dh_n) dh += simt::to_float(static_cast<const Storage*>(s.p.dh_n)[state]);
  } else if (s.carry_h) {
    dh += static_cast<const Acc*>(s.carry_h)[state];
  }
  if (s.step < 0) {
    static_cast<Storage*>(s.p.d_h0)[state] = simt::from_float<Storage>(dh);
    return dh;
  }
  const int64_t row = (info.row * s.p.D + dir) * s.p.P + unit;
  const bool active = info.flags & kActive;
  if (active && s.p.dy) dh += simt::to_float(static_cast<const Storage*>(s.p.dy)[row]);
  if (active || !s.p.seq.offsets) {
    static_cast<Storage*>(s.p.d_h)[(dir * s.p.seq.N + info.row) * s.p.P + unit] =
        simt::from_float<Storage>(active ? dh : Acc(0));
  }
  return dh;
}

// The code does not depend on the cell of G: gates are counted at run time.
template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) state_grad_kernel(const BackwardStep s) {
  using Storage = typename G::Storage;
  const int dir = simt::block_z();
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  const Operand<Storage> operands[1] = {
      {static_cast<const Storage*>(s.p.weights[dir].w_hh.data), s.p.P, gate_count(s.p.cell) * s.p.H, s.copy_bytes}};
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();

  RowInfo* table = matmul.table();
  bool nonzero = false;
  if (simt::thread_x() < G::kBatch) {
    int64_t next_row;
    bool next_reset;
    RowInfo info = backward_row(s.p.seq, s.p.modifier, s.step, dir, first_row + simt::thread_x(), next_row, next_reset);
    info.source[0] = next_gate_gradient<Storage>(s.p, dir, info, next_row, next_reset);
    nonzero = info.source[0] != nullptr;
    table[simt::thread_x()] = info;
  }
  nonzero = simt::sync_block_or(nonzero);
  simt::pdl_wait();
  simt::pdl_launch_dependents();

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
#pragma unroll(G::kElements <= 4 ? G::kElements : 4)
  for (int e = 0; e < G::kElements; ++e) {
    const int index = simt::thread_x() + e * G::kThreads, unit = index % G::kUnits, batch = index / G::kUnits;
    if (batch >= G::kBatch || first_unit + unit >= s.p.P || !(table[batch].flags & kExists)) continue;
    finish_state_gradient<Storage>(s, dir, first_row + batch, first_unit + unit, table[batch], matmul.sum(0, unit, batch));
  }
}

}  // namespace fused_rnn::cuda
