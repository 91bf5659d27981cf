// A whole forward sequence of one layer in one launch (persistent.h has the geometry): with a = W_ih x + b_ih from `gates`,
//   h[t] = cell(a[t], W_hh h[t-1] + b_hh)   for the slice's units, row by row of the batch.
// A thread finishes elements (unit, row) of each batch tile, always the same ones, and keeps their h and c in fp32, in registers
// or in shared memory, where only the thread that takes turns with it touches them too (ElementPlace::kAlternate). Per step and
// tile: the projection is requested, the product awaits the states of all slices, the sums of the warps meet at the one barrier, the
// elements are finished and their new states published; only then are results stored. In a cluster, blocks of 32 units request the
// projection for the next tile or step before they store (ElementPlace::kEarly); in blocks of 16, where half of the threads have an
// element, the other half does so at the same time. What is published for step s is the state before it, zero where the row is
// reset. Steps are counted from the launch's first.
#pragma once
#include "cuda/persistent/persistent_elements.cuh"

namespace fused_rnn::cuda {

template <class G>
struct PersistentForward : BlockElements<G> {
  using Base = BlockElements<G>;
  using Base::active, Base::block, Base::c_index, Base::exists, Base::first_step, Base::gate_index, Base::H, Base::length,
      Base::product, Base::publish, Base::reset, Base::row_of_batch, Base::state, Base::state_index, Base::steps, Base::time,
      Base::y_index;
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = ElementPlace<G>;
  // What an element needs beside the product, requested before it and looked at after it.
  struct Element {
    Storage projection[C::kGates];
    unsigned char reset;  // before the next step: not 0
  };
  // What is stored of a step.
  struct Result {
    Storage a[C::kSlots], c, h;
    bool active;
  };

  const ForwardParams& p;
  const PersistentLaunch& l;

  __device__ __forceinline__ PersistentForward(const ForwardSequence& s, const BlockPlace& place,
                                               PersistentProduct<G>& weights)
      : Base(s, place, weights), p(s.p), l(s.l) {}

  __device__ __forceinline__ float h(const Place& e, int tile) const { return Base::kept(0, e, tile); }
  __device__ __forceinline__ float c(const Place& e, int tile) const { return Base::kept(1, e, tile); }
  __device__ __forceinline__ void keep(const Place& e, int tile, float h_state, float c_state) {
    Base::keep(0, e, tile, h_state);
    if constexpr (C::kHasC) Base::keep(1, e, tile, c_state);
  }

  // The states before step 0, which it publishes. row: of memory, the first of time(0).
  __device__ __forceinline__ void begin(int tile, int row) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(tile, i);
      float h0 = 0.0f, c0 = 0.0f;
      if (exists(e, tile) && !reset(e, tile, time(0), row, length(e, tile))) {
        h0 = simt::to_float(state(first_step > 0 ? p.h_n : p.h0, e, tile));
        if constexpr (C::kHasC) {
          const auto index = state_index(e, tile);
          c0 = first_step > 0 ? l.carry[index] : p.c0 ? load_c0<Storage>(p, index) : 0.0f;
        }
      }
      if (!e.mine) continue;
      keep(e, tile, h0, c0);
      publish(e, tile, 0, 0, h0);
    }
  }

  __device__ __forceinline__ void load(const Place& e, int tile, int step, const StepRows& rows, Element& x) const {
    x = Element{};
    if (!exists(e, tile)) return;
    const int steps_of_row = length(e, tile);
    x.reset = reset(e, tile, time(step + 1), rows.next, steps_of_row);
    if (!active(time(step), steps_of_row)) return;
    const int row = rows.now + row_of_batch(e, tile);
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
  __device__ __forceinline__ void finish(const Place& e, int tile, int step, const Element& x, int buffer, Result& result) {
    if (!e.mine) return;
    result.active = Base::takes_part(e, tile, time(step));
    const float h_prev = C::kReadsH ? h(e, tile) : 0.0f, c_prev = C::kHasC ? c(e, tile) : 0.0f;
    float a[C::kSlots] = {};
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) a[g] = simt::to_float(x.projection[g]);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      a[C::recurrent_slot(g)] += product.bias(g, e.unit) + product.sum(buffer, g, e.unit, e.b);
    }
    C::sigmoids(a);
    simt::issue_loads();
    float h_state, c_state = c_prev;
    if (result.active) {
      C::forward_of_sigmoids(p.cell, a, h_prev, c_prev, h_state, c_state);
    } else {
      h_state = h(e, tile);
    }
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) result.a[slot] = simt::from_float<Storage>(a[slot]);
    result.c = simt::from_float<Storage>(c_state);
    result.h = simt::from_float<Storage>(h_state);
    h_state = simt::to_float(result.h);
    if (step + 1 < steps) {
      if (x.reset) h_state = c_state = 0.0f;
      publish(e, tile, step + 1, 0, h_state);
    }
    keep(e, tile, h_state, c_state);
  }

  // Stores what is kept of a step whose first row of memory is `first`; zeros where a row is inactive.
  __device__ __forceinline__ void store(const Place& e, int tile, int first, const Result& result) const {
    if (!exists(e, tile) || (!result.active && p.seq.offsets)) return;
    const int row = simt::opaque(first + row_of_batch(e, tile));
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
  __device__ __forceinline__ void end(int tile, int turn) const {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(turn, i);
      if (!exists(e, tile)) continue;
      static_cast<Storage*>(p.h_n)[state_index(e, tile)] = simt::from_float<Storage>(h(e, tile));
      if constexpr (C::kHasC) {
        if (first_step + steps < p.seq.T) {
          l.carry[state_index(e, tile)] = c(e, tile);
        } else {
          store_c_n<Storage>(p, state_index(e, tile), c(e, tile));
        }
      }
    }
  }
};

// The recurrent biases of a slice, zeros where there are none; read after the next barrier.
template <class G>
__device__ __forceinline__ void load_biases(const PersistentProduct<G>& product, const void* b_hh, int H, int slice) {
  constexpr int kGates = Cell<G::kCell>::kGates;
  for (int i = simt::thread_x(); i < kGates * G::kUnits; i += kPersistentThreads) {
    const int gate = i / G::kUnits, unit = slice * G::kUnits + i % G::kUnits;
    const bool has_bias = b_hh && unit < H;
    product.bias(gate, i % G::kUnits) =
        has_bias ? simt::to_float(static_cast<const typename G::Storage*>(b_hh)[gate * H + unit]) : 0.0f;
  }
}

template <class G>
__device__ __forceinline__ void persistent_forward(const ForwardSequence& s) {
  using Place = ElementPlace<G>;
  const BlockPlace block = block_place(s.l, s.p.seq.B);
  PersistentProduct<G> product(block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data, s.p.H, s.l, block.slice,
                               block.group);
  PersistentForward<G> forward(s, block, product);

  for (int i = simt::thread_x(); i < block.tiles * kTileRows; i += kPersistentThreads) {
    product.lengths()[i] = count_active(s.p.seq, block.first_row + i);
  }
  load_biases(product, block.dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh, forward.H, block.slice);
  product.exchange.start();
  simt::sync_block();
  StepRows rows(s.p.seq, [&](int step) { return forward.time(step); });
  for (int tile = 0; tile < block.tiles; ++tile) forward.begin(tile, rows.now);

  typename PersistentForward<G>::Element x[Place::kPerThread];
  const auto load = [&](int turn, int tile, int step, const StepRows& its_rows) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) forward.load(Place(turn, i), tile, step, its_rows, x[i]);
  };
  if constexpr (Place::kEarly) load(0, 0, 0, rows);
  int buffer = 0;
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      if constexpr (!Place::kEarly) load(tile, tile, step, rows);
      typename PersistentProduct<G>::Sums sums;
      product.run(sums, tile, step);
      product.store_sums(sums, buffer);
      simt::sync_block();
      const bool same_step = tile + 1 < block.tiles, has_next = same_step || step + 1 < forward.steps;
      const int next = same_step ? tile + 1 : 0;
      typename PersistentForward<G>::Result results[Place::kPerThread];
      if constexpr (Place::kAlternate) {
        if (const Place e(buffer, 0); e.mine) {
          forward.finish(e, tile, step, x[0], buffer, results[0]);
          forward.store(e, tile, rows.now, results[0]);
        } else if (has_next) {
          load(buffer ^ 1, next, same_step ? step : step + 1, same_step ? rows : rows.following());
        }
      } else {
#pragma unroll
        for (int i = 0; i < Place::kPerThread; ++i) {
          forward.finish(Place(tile, i), tile, step, x[i], buffer, results[i]);
          if constexpr (!Place::kEarly) forward.store(Place(tile, i), tile, rows.now, results[i]);
        }
      }
      const int row = rows.now;
      if (!same_step) rows.advance(s.p.seq, forward.time(step + 3));
      if constexpr (Place::kEarly && !Place::kAlternate) {
        if (has_next) load(next, next, same_step ? step : step + 1, rows);
        forward.store(Place(tile, 0), tile, row, results[0]);
      }
      buffer ^= 1;
    }
  }
  // buffer has the parity of all tiles finished; those of the last step are the last block.tiles of them.
  for (int tile = 0; tile < block.tiles; ++tile) forward.end(tile, Place::turn(tile, buffer + block.tiles + tile));
}

template <class G>
__global__ void __launch_bounds__(kPersistentThreads, 1) persistent_forward_kernel(const ForwardSequence s) {
  if constexpr (simt::arch() >= (G::kCluster ? 900 : 800)) persistent_forward<G>(s);
}

}  // namespace fused_rnn::cuda
