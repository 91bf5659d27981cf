// A whole forward sequence of one layer in one launch (plan/persistent_geometry.h): with a = W_ih x + b_ih from `gates`,
//   h[t] = cell(a[t], W_hh h[t-1] + b_hh)   for the slice's units, row by row of the batch.
// A thread finishes elements (unit, row) of each row tile, the same ones in all steps (kAlternate: one of two threads in
// turn). It keeps their h and c in fp32, in registers or in shared memory. A turn (persistent_turns.cuh) has these parts:
//   load      requests the projection and the reset of an element
//   multiply  awaits the states of all slices; the sums of the warps meet at the one barrier of the turn
//   finish    applies the cell and publishes the new state
//   store     writes the results
// ElementPlace::kSchedule says in which order they come. Exchange s carries the states before step s, zeros where a row is
// reset. Steps are counted from the launch's first.
#pragma once
#include "cuda/persistent/persistent_turns.cuh"

namespace fused_rnn::cuda {

template <class G>
struct PersistentForward : BlockElements<G> {
  using Base = BlockElements<G>;
  using Base::active, Base::block, Base::c_index, Base::exists, Base::first_step, Base::gate_index, Base::H, Base::length,
      Base::product, Base::publish, Base::reset, Base::row_of_batch, Base::state, Base::state_index, Base::steps, Base::time,
      Base::y_index;
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = PlaceOf<G>;
  // What an element needs beside the product: requested before the product, used after it.
  struct Element {
    Storage projection[C::kGates];
    unsigned char reset;  // not 0: the state is reset before the next step
  };
  // What is stored of a step.
  struct Result {
    Storage a[C::kSlots], c, h;
    bool active;
  };

  const ForwardParams& p;
  const PersistentLaunch& l;

  __device__ __forceinline__ PersistentForward(const ForwardSequence& s, const BlockPlace& place, ProductOf<G>& weights)
      : Base(s, place, weights), p(s.p), l(s.l) {}

  __device__ __forceinline__ float h(const Place& e, int row_tile) const { return Base::held(0, e, row_tile); }
  __device__ __forceinline__ float c(const Place& e, int row_tile) const { return Base::held(1, e, row_tile); }
  __device__ __forceinline__ void keep(const Place& e, int row_tile, float h_state, float c_state) {
    Base::keep(0, e, row_tile, h_state);
    if constexpr (C::kHasC) Base::keep(1, e, row_tile, c_state);
  }

  // Publishes the states before step 0. row: the first row of memory at time(0).
  __device__ __forceinline__ void begin(int row_tile, int row) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(row_tile, i);
      float h0 = 0.0f, c0 = 0.0f;
      if (exists(e, row_tile) && !reset(e, row_tile, time(0), row, length(e, row_tile))) {
        h0 = simt::to_float(state(first_step > 0 ? p.h_n : p.h0, e, row_tile));
        if constexpr (C::kHasC) {
          const auto index = state_index(e, row_tile);
          c0 = first_step > 0 ? l.carry[index] : p.c0 ? load_c0<Storage>(p, index) : 0.0f;
        }
      }
      if (!e.mine) continue;
      keep(e, row_tile, h0, c0);
      publish(e, row_tile, 0, 0, h0);
    }
  }

  __device__ __forceinline__ void load(const Place& e, int row_tile, int step, const StepRows& rows, Element& x) const {
    x = Element{};
    if (!exists(e, row_tile)) return;
    const int steps_of_row = length(e, row_tile);
    x.reset = reset(e, row_tile, time(step + 1), rows.next, steps_of_row);
    if (!active(time(step), steps_of_row)) return;
    const int row = rows.now + row_of_batch(e, row_tile);
    const auto* projection = static_cast<const Storage*>(p.gates) + gate_index(e, row);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) x.projection[g] = projection[g * H];
    const int ahead = rows.ahead(kPrefetchSteps);
    if (!active(time(step + kPrefetchSteps), steps_of_row) || !Base::hints(e, row + ahead)) return;
    projection += int64_t{ahead} * (C::kSlots * H);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) simt::prefetch_l2(projection + g * H);
  }

  // After the barrier: adds the product, applies the cell and publishes the state for the next step.
  __device__ __forceinline__ void finish(const Place& e, int row_tile, int step, const Element& x, int buffer,
                                         Result& result) {
    if (!e.mine) return;
    result.active = Base::takes_part(e, row_tile, time(step));
    const float h_prev = C::kReadsH ? h(e, row_tile) : 0.0f, c_prev = C::kHasC ? c(e, row_tile) : 0.0f;
    float a[C::kSlots] = {};
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) a[g] = simt::to_float(x.projection[g]);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      a[C::recurrent_slot(g)] += product.bias(g, e.unit) + product.sum(buffer, g, e);
    }
    C::sigmoids(a);
    simt::issue_loads();
    float h_state, c_state = c_prev;
    if (result.active) {
      C::forward_of_sigmoids(p.cell, a, h_prev, c_prev, h_state, c_state);
    } else {
      h_state = h(e, row_tile);
    }
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) result.a[slot] = simt::from_float<Storage>(a[slot]);
    result.c = simt::from_float<Storage>(c_state);
    result.h = simt::from_float<Storage>(h_state);
    h_state = simt::to_float(result.h);
    if (step + 1 < steps) {
      if (x.reset) h_state = c_state = 0.0f;
      publish(e, row_tile, step + 1, 0, h_state);
    }
    keep(e, row_tile, h_state, c_state);
  }

  // Stores what is kept of a step whose first row of memory is `first`; zeros where a row is inactive.
  __device__ __forceinline__ void store(const Place& e, int row_tile, int first, const Result& result) const {
    if (!exists(e, row_tile) || (!result.active && p.seq.offsets)) return;
    const int row = simt::opaque(first + row_of_batch(e, row_tile));
    const Storage zero = simt::from_float<Storage>(0.0f);
    static_cast<Storage*>(p.y)[y_index(e, row)] = result.active ? result.h : zero;
    if (!p.training) return;
    if constexpr (C::kSaved > 0) {
      auto* gates = static_cast<Storage*>(p.gates) + gate_index(e, row);
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) {
        gates[slot * H] = result.active ? result.a[slot] : zero;
      }
    }
    if constexpr (C::kHasC) {
      static_cast<Storage*>(p.cs)[c_index(e, row)] = result.active ? result.c : zero;
    }
  }

  // The states after the launch's last step.
  __device__ __forceinline__ void end(int row_tile, int half) const {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(half, i);
      if (!exists(e, row_tile)) continue;
      static_cast<Storage*>(p.h_n)[state_index(e, row_tile)] = simt::from_float<Storage>(h(e, row_tile));
      if constexpr (C::kHasC) {
        if (first_step + steps < p.seq.T) {
          l.carry[state_index(e, row_tile)] = c(e, row_tile);
        } else {
          store_c_n<Storage>(p, state_index(e, row_tile), c(e, row_tile));
        }
      }
    }
  }
};

// Active steps of the group's rows; read after the next barrier. product: of either kind.
template <class Product>
__device__ __forceinline__ void load_lengths(const Product& product, const Sequence& seq, const BlockPlace& block) {
  for (int i = simt::thread_x(); i < block.row_tiles * kTileRows; i += kPersistentThreads) {
    product.lengths()[i] = count_active(seq, block.first_row + i);
  }
}

// The recurrent biases of a slice, zeros where there are none; read after the next barrier.
template <class G, class Product>
__device__ __forceinline__ void load_biases(const Product& product, const void* b_hh, int H, int slice) {
  constexpr int kGates = Cell<G::kCell>::kGates;
  const int threads = G::kBlock ? simt::block_dim_x() : kPersistentThreads;
  for (int i = simt::thread_x(); i < kGates * G::kUnits; i += threads) {
    const int gate = i / G::kUnits, unit = slice * G::kUnits + i % G::kUnits;
    const bool has_bias = b_hh && unit < H;
    product.bias(gate, i % G::kUnits) =
        has_bias ? simt::to_float(static_cast<const typename G::Storage*>(b_hh)[gate * H + unit]) : 0.0f;
  }
}

// Awaits the states of all slices and multiplies the weights by them. The barrier also ends the use of the other buffer.
template <class G>
__device__ __forceinline__ void multiply_states(PersistentProduct<G>& product, int row_tile, int step, int buffer) {
  typename PersistentProduct<G>::Sums sums;
  product.run(sums, row_tile, step);
  product.store_sums(sums, buffer);
  simt::sync_block();
}

// The loop over steps and row tiles, one function for each schedule, from the publication of the first states to the final
// states. Published by the caller, the first states cost the cluster kernels of 16 units 4 registers (nvcc 13.0, sm_90a).
// rows: of step 0.
template <class G>
__device__ __forceinline__ void run_plain(PersistentForward<G>& forward, PersistentProduct<G>& product,
                                          const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) forward.begin(row_tile, rows.now);
  typename PersistentForward<G>::Element x[Place::kPerThread];
  int buffer = 0;
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      load_elements(forward, x, row_tile, row_tile, step, rows);
      multiply_states(product, row_tile, step, buffer);
      const NextTurn next(block, row_tile, step, forward.steps);
      typename PersistentForward<G>::Result results[Place::kPerThread];
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) {
        forward.finish(Place(row_tile, i), row_tile, step, x[i], buffer, results[i]);
        forward.store(Place(row_tile, i), row_tile, rows.now, results[i]);
      }
      if (!next.same_step) rows.advance(forward.seq, forward.time(step + 3));
      buffer ^= 1;
    }
  }
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) forward.end(row_tile, row_tile);
}

template <class G>
__device__ __forceinline__ void run_early(PersistentForward<G>& forward, PersistentProduct<G>& product,
                                          const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) forward.begin(row_tile, rows.now);
  typename PersistentForward<G>::Element x[1];
  load_elements(forward, x, 0, 0, 0, rows);
  int buffer = 0;
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      multiply_states(product, row_tile, step, buffer);
      const NextTurn next(block, row_tile, step, forward.steps);
      typename PersistentForward<G>::Result result;
      forward.finish(Place(row_tile, 0), row_tile, step, x[0], buffer, result);
      const int row = rows.now;
      if (!next.same_step) rows.advance(forward.seq, forward.time(step + 3));
      if (next.exists) load_elements(forward, x, next.row_tile, next.row_tile, next.same_step ? step : step + 1, rows);
      forward.store(Place(row_tile, 0), row_tile, row, result);
      buffer ^= 1;
    }
  }
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) forward.end(row_tile, row_tile);
}

template <class G>
__device__ __forceinline__ void run_alternate(PersistentForward<G>& forward, PersistentProduct<G>& product,
                                              const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) forward.begin(row_tile, rows.now);
  typename PersistentForward<G>::Element x[1];
  load_elements(forward, x, 0, 0, 0, rows);
  int buffer = 0;  // parity of the turns made: the buffer of sums in use, and the half whose turn it is
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      multiply_states(product, row_tile, step, buffer);
      const NextTurn next(block, row_tile, step, forward.steps);
      typename PersistentForward<G>::Result result;
      if (const Place e(buffer, 0); e.mine) {
        forward.finish(e, row_tile, step, x[0], buffer, result);
        forward.store(e, row_tile, rows.now, result);
      } else if (next.exists) {
        load_elements(forward, x, buffer ^ 1, next.row_tile, next.same_step ? step : step + 1,
                      next.same_step ? rows : rows.following());
      }
      if (!next.same_step) rows.advance(forward.seq, forward.time(step + 3));
      buffer ^= 1;
    }
  }
  // Counted from the turn that would follow, whose parity is `buffer`, row_tile was finished row_tiles - row_tile turns ago.
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
    forward.end(row_tile, buffer + block.row_tiles + row_tile);
  }
}

template <class G>
__device__ __forceinline__ void persistent_forward(const ForwardSequence& s) {
  const BlockPlace block = block_place(s.l, s.p.seq.B);
  const void* const w_hh = block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data;
  PersistentProduct<G> product(w_hh, s.p.H, s.l, block.slice, block.group);
  PersistentForward<G> forward(s, block, product);
  load_lengths(product, s.p.seq, block);
  load_biases<G>(product, block.dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh, forward.H, block.slice);
  product.exchange.start();
  simt::sync_block();
  StepRows rows(s.p.seq, [&](int step) { return forward.time(step); });
  if constexpr (ElementPlace<G>::kSchedule == Schedule::kPlain) {
    run_plain(forward, product, block, rows);
  } else if constexpr (ElementPlace<G>::kSchedule == Schedule::kEarly) {
    run_early(forward, product, block, rows);
  } else {
    run_alternate(forward, product, block, rows);
  }
}

template <class G>
__global__ void __launch_bounds__(kPersistentThreads, 1) persistent_forward_kernel(const ForwardSequence s) {
  if constexpr (simt::arch() >= (G::kCluster ? 900 : 800)) persistent_forward<G>(s);
}

}  // namespace fused_rnn::cuda
