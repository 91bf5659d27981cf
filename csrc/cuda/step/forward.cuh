// One forward step of one layer: h[t] = cell(x[t] W_ih^T + b_ih, h[t-1] W_hh^T + b_hh), in one kernel.
//
// A block owns kUnits hidden units, with all gates of each, of kBatch batch rows in one direction (blockIdx.z); a thread
// finishes kElements (unit, row) pairs. Per step: the product (matmul.cuh), the pointwise part, stores. Everything that does
// not depend on the preceding step is requested before pdl_wait: weights, projection, biases, lengths and resets.
// kForward reads the projection x W_ih^T + b_ih from `gates`; kForwardInput makes it, as the first phase of the product.
// kForwardModified is kForward with reset states and the options of steps (modified.cuh).
// A cell with a projection leaves h in `hidden` (rounded to dtype), and project_kernel multiplies it by W_hr.
#pragma once
#include "cuda/device/cell_device.cuh"
#include "cuda/step/kernels.h"
#include "cuda/step/matmul.cuh"
#include "cuda/step/modified.cuh"
#include "cuda/step/rows.cuh"

namespace fused_rnn::cuda {

// The recurrent state's row that an active row starts from; null: zeros.
template <class Storage, bool kModified>
__device__ __forceinline__ const Storage* previous_state(const ForwardParams& p, int64_t step, int dir, int64_t b,
                                                         const RowInfo& info) {
  if constexpr (kModified) {
    if (info.flags & kReset) {
      return static_cast<const Storage*>(reset_row(p.modifier.h, time_of_step(p.seq, step, dir), dir, b));
    }
  }
  if (info.flags & kReset) return nullptr;
  if (info.flags & kHasPrevious) return static_cast<const Storage*>(p.y) + (info.other * p.D + dir) * p.P;
  return p.h0 ? static_cast<const Storage*>(p.h0) + (dir * p.seq.B + b) * p.P : nullptr;
}

// y and h_n of output p_unit of row b. Rows that are inactive in a dense batch get y = 0.
template <class Storage, class Acc>
__device__ __forceinline__ void store_output(const ForwardParams& p, int dir, int64_t b, int64_t unit, const RowInfo& info,
                                             Acc h) {
  const int64_t state = (dir * p.seq.B + b) * p.P + unit;
  const bool active = info.flags & kActive;
  if (active || !p.seq.offsets) {
    static_cast<Storage*>(p.y)[(info.row * p.D + dir) * p.P + unit] = simt::from_float<Storage>(active ? h : Acc(0));
  }
  if (active && !(info.flags & kHasNext)) static_cast<Storage*>(p.h_n)[state] = simt::from_float<Storage>(h);
  if (info.flags & kNever) {
    static_cast<Storage*>(p.h_n)[state] =
        p.h0 ? static_cast<const Storage*>(p.h0)[state] : simt::from_float<Storage>(Acc(0));
  }
}

// The pointwise part of a forward step, for the elements of one thread.
template <class G>
struct ForwardElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using C = DeviceCell<G::kCell>;
  static constexpr bool kInput = G::kRole == KernelRole::kForwardInput;
  static constexpr int kSaved = G::kModified ? C::kSlots : C::kSaved;
  static_assert(G::kUnits * G::kBatch % G::kThreads == 0, "no element of a thread is outside the tile");

  const ForwardStep& s;
  const RowInfo* table;
  int dir;
  int64_t first_unit, first_row;
  Acc a[G::kElements][C::kSlots];  // accumulators: projection and biases, later the whole
  Acc c_prev[G::kElements], h_prev[G::kElements];

  static __device__ __forceinline__ int unit_of(int e) { return (simt::thread_x() + e * G::kThreads) % G::kUnits; }
  static __device__ __forceinline__ int batch_of(int e) { return (simt::thread_x() + e * G::kThreads) / G::kUnits; }
  // Whether element e is inside the problem.
  __device__ __forceinline__ bool exists(int e) const {
    return first_unit + unit_of(e) < s.p.H && table[batch_of(e)].flags & kExists;
  }
  __device__ __forceinline__ int64_t state_index(int e) const {
    return (dir * s.p.seq.B + first_row + batch_of(e)) * s.p.H + first_unit + unit_of(e);
  }
  __device__ __forceinline__ int64_t gate_index(int e, int64_t row) const {
    return (dir * s.p.seq.N + row) * C::kSlots * s.p.H + first_unit + unit_of(e);
  }

  // Projection and biases, which do not depend on the preceding step.
  __device__ __forceinline__ void load_projection() {
    const auto* b_ih = static_cast<const Storage*>(dir ? s.p.weights[1].b_ih : s.p.weights[0].b_ih);
    const auto* b_hh = static_cast<const Storage*>(dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh);
#pragma unroll
    for (int e = 0; e < G::kElements; ++e) {
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) a[e][slot] = Acc(0);
      if (!exists(e) || !(table[batch_of(e)].flags & kActive)) continue;
      const int64_t unit = first_unit + unit_of(e);
      const auto* projection = static_cast<const Storage*>(s.p.gates) + gate_index(e, table[batch_of(e)].row);
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) {
        if constexpr (kInput) {
          if (b_ih) a[e][g] += simt::to_float(b_ih[g * s.p.H + unit]);
        } else {
          a[e][g] += simt::to_float(projection[g * s.p.H]);
        }
        if (b_hh) a[e][C::recurrent_slot(g)] += simt::to_float(b_hh[g * s.p.H + unit]);
      }
    }
  }

  // The state before the step.
  __device__ __forceinline__ void load_state() {
#pragma unroll
    for (int e = 0; e < G::kElements; ++e) {
      h_prev[e] = c_prev[e] = Acc(0);
      if (!exists(e)) continue;
      const RowInfo& info = table[batch_of(e)];
      // Zoneout does not come with a projection, whose rows of h are shorter.
      if (C::kReadsH || (G::kModified && is_zoneout(s.p.modifier.zoneout_h))) {
        const auto* state = static_cast<const Storage*>(info.source[G::kOperands - 1]);
        if (state) h_prev[e] = simt::to_float(state[first_unit + unit_of(e)]);
      }
      if constexpr (C::kHasC) {
        if constexpr (G::kModified) {
          if (info.flags & kReset) c_prev[e] = reset_c(e);
        }
        if (info.flags & kReset) continue;
        if (info.flags & kHasPrevious) {
          c_prev[e] = static_cast<const Acc*>(s.c)[state_index(e)];
        } else if (s.p.c0) {
          c_prev[e] = load_c0<Storage>(s.p, state_index(e));
        }
      }
    }
  }

  // Adds the products, applies the cell, stores. sum(slot, unit, batch): of the product; output(batch, unit, info, h) takes
  // the new h of a layer without projection.
  template <class Sum, class Output>
  __device__ __forceinline__ void finish(const Sum& sum, const Output& output) {
#pragma unroll
    for (int e = 0; e < G::kElements; ++e) {
      if (!exists(e)) continue;
      const int unit = unit_of(e), batch = batch_of(e);
      const RowInfo& info = table[batch];
#pragma unroll
      for (int slot = 0; slot < G::kSlots; ++slot) {
        a[e][kInput ? slot : C::recurrent_slot(slot)] += sum(slot, unit, batch);
      }
      Acc h, c;
      if constexpr (G::kModified) {
        modified_cell(e, info, h, c);
      } else {
        C::forward(s.p.cell, a[e], h_prev[e], c_prev[e], h, c);
      }
      if (s.hidden) {
        static_cast<Storage*>(s.hidden)[state_index(e)] = simt::from_float<Storage>(h);
      } else {
        output(first_row + batch, first_unit + unit, info, h);
      }
      if constexpr (C::kHasC) store_c(e, info, c);
      if constexpr (kSaved > 0) {
        if (s.p.training && saves() && (info.flags & kActive || !s.p.seq.offsets)) {
          auto* gates = static_cast<Storage*>(s.p.gates) + gate_index(e, info.row);
          const bool active = info.flags & kActive;
#pragma unroll
          for (int slot = 0; slot < kSaved; ++slot) {
            gates[slot * s.p.H] = simt::from_float<Storage>(active ? a[e][slot] : Acc(0));
          }
        }
      }
    }
  }

  // Whether slots are kept for backward: of an RNN those of steps that are more than the cell's.
  __device__ __forceinline__ bool saves() const {
    if constexpr (C::kSaved > 0) return true;
    return modifies_steps(s.p.modifier);
  }

  // What a reset puts into c before the step.
  __device__ __forceinline__ Acc reset_c(int e) const {
    const int64_t t = time_of_step(s.p.seq, s.step, dir);
    const auto* row = static_cast<const Storage*>(reset_row(s.p.modifier.c, t, dir, first_row + batch_of(e)));
    return row ? Acc(simt::to_float(row[first_unit + unit_of(e)])) : Acc(0);
  }

  // The cell with the options of steps; the flags of rows that take no part may lie outside of memory.
  __device__ __forceinline__ void modified_cell(int e, const RowInfo& info, Acc& h, Acc& c) {
    const Modifier& m = s.p.modifier;
    C::forward(s.p.cell, a[e], h_prev[e], c_prev[e], h, c, step_modifier<Storage, Acc>(m, state_index(e)));
    if (!(info.flags & kActive)) return;
    const int64_t flags = (dir * s.p.seq.N + info.row) * s.p.H + first_unit + unit_of(e);
    h = zoneout_unit<Acc>(m.zoneout_h, flags).after(h_prev[e], h);
    if constexpr (C::kHasC) c = zoneout_unit<Acc>(m.zoneout_c, flags).after(c_prev[e], c);
  }

  __device__ __forceinline__ void store_c(int e, const RowInfo& info, Acc c) const {
    const int64_t state = state_index(e);
    if (info.flags & kNever) store_c_n<Storage>(s.p, state, s.p.c0 ? load_c0<Storage>(s.p, state) : Acc(0));
    const bool active = info.flags & kActive;
    if (s.p.training && (active || !s.p.seq.offsets)) {
      static_cast<Storage*>(s.p.cs)[(dir * s.p.seq.N + info.row) * s.p.H + first_unit + unit_of(e)] =
          simt::from_float<Storage>(active ? c : Acc(0));
    }
    if (!active) return;
    static_cast<Acc*>(s.c)[state] = c;
    if (!(info.flags & kHasNext)) store_c_n<Storage>(s.p, state, c);
  }
};

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) forward_kernel(const ForwardStep s) {
  using Storage = typename G::Storage;
  constexpr bool kInput = G::kRole == KernelRole::kForwardInput;
  const int dir = simt::block_z();
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  Operand<Storage> operands[G::kOperands];
  if constexpr (kInput) {
    operands[0] = {static_cast<const Storage*>(dir ? s.p.weights[1].w_ih.data : s.p.weights[0].w_ih.data), s.p.H, s.p.I,
                   s.copy_input};
  }
  operands[G::kOperands - 1] = {static_cast<const Storage*>(dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data),
                                s.p.H, s.p.P, s.copy_state};
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();
  if constexpr (G::kModified) {
    if (s.p.modifier.product) matmul.multiply_states();
  }

  RowInfo* table = matmul.table();
  bool nonzero = false;
  if (simt::thread_x() < G::kBatch) {
    const int64_t b = first_row + simt::thread_x();
    RowInfo info = forward_row(s.p.seq, s.p.modifier, s.step, dir, b);
    if (info.flags & kActive) {
      info.source[G::kOperands - 1] = previous_state<Storage, G::kModified>(s.p, s.step, dir, b, info);
      if constexpr (G::kModified) {
        if (s.p.modifier.product) {
          info.source[1] = static_cast<const Storage*>(s.p.modifier.product) + (dir * s.p.seq.B + b) * s.p.P;
        }
      }
      if constexpr (kInput) info.source[0] = static_cast<const Storage*>(s.p.x) + info.row * s.p.I;
    }
    nonzero = info.source[0] || info.source[G::kOperands - 1];
    table[simt::thread_x()] = info;
  }
  nonzero = simt::sync_block_or(nonzero);

  ForwardElements<G> elements{s, table, dir, first_unit, first_row, {}, {}, {}};
  elements.load_projection();
  simt::pdl_wait();
  simt::pdl_launch_dependents();
  elements.load_state();

  typename G::Accumulators acc;
  matmul.run(nonzero, acc);
  matmul.store_sums(acc);
  elements.finish([](int slot, int unit, int batch) { return Matmul<G>::sum(slot, unit, batch); },
                  [&](int64_t b, int64_t unit, const RowInfo& info, typename G::Acc h) {
                    store_output<Storage>(s.p, dir, b, unit, info, h);
                  });
}

// h[t] = of(hidden W_hr^T), for an LSTM with proj_size. A block owns kUnits outputs of kBatch batch rows.
// of(sum, row, unit): what is stored; row: in memory, of an active row.
template <class G, class Of>
__device__ __forceinline__ void project(const ForwardStep& s, const Of& of) {
  using Storage = typename G::Storage;
  const int dir = simt::block_z();
  const int64_t first_row = static_cast<int64_t>(simt::block_x()) * G::kBatch;
  const int64_t first_unit = static_cast<int64_t>(simt::block_y()) * G::kUnits;

  const Operand<Storage> operands[1] = {
      {static_cast<const Storage*>(dir ? s.p.weights[1].w_hr.data : s.p.weights[0].w_hr.data), s.p.P, s.p.H, s.copy_state}};
  Matmul<G> matmul(operands, first_unit, s.stages);
  matmul.prefetch_weights();

  RowInfo* table = matmul.table();
  bool active = false;
  if (simt::thread_x() < G::kBatch) {
    const int64_t b = first_row + simt::thread_x();
    RowInfo info = forward_row(s.p.seq, s.p.modifier, s.step, dir, b);
    active = info.flags & kActive;
    if (active) info.source[0] = static_cast<const Storage*>(s.hidden) + (dir * s.p.seq.B + b) * s.p.H;
    table[simt::thread_x()] = info;
  }
  active = simt::sync_block_or(active);
  simt::pdl_wait();
  simt::pdl_launch_dependents();

  typename G::Accumulators acc;
  matmul.run(active, acc);
  matmul.store_sums(acc);
#pragma unroll
  for (int e = 0; e < G::kElements; ++e) {
    const int index = simt::thread_x() + e * G::kThreads, unit = index % G::kUnits, batch = index / G::kUnits;
    if (batch >= G::kBatch || first_unit + unit >= s.p.P || !(table[batch].flags & kExists)) continue;
    const RowInfo& info = table[batch];
    typename G::Acc h = matmul.sum(0, unit, batch);
    if (info.flags & kActive) h = of(h, info.row, first_unit + unit);
    store_output<Storage>(s.p, dir, first_row + batch, first_unit + unit, info, h);
  }
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) project_kernel(const ForwardStep s) {
  project<G>(s, [](typename G::Acc sum, int64_t, int64_t) { return sum; });
}

}  // namespace fused_rnn::cuda
