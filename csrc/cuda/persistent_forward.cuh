// A whole forward sequence of one layer in one launch (persistent.h has the geometry): with a = W_ih x + b_ih from `gates`,
//   h[t] = cell(a[t], W_hh h[t-1] + b_hh)   for the slice's units, row by row of the batch.
// A thread finishes elements (unit, row) of each batch tile, always the same ones, and keeps their h and c in fp32, in
// registers or in shared memory that no other thread touches. Per step and tile: the projection is requested, the product awaits the states of all
// slices, the sums of the warps meet at the one barrier, the elements are finished and their new states published.
// What is published for step s is the state before it, zero where the row is reset. Steps are counted from the launch's first.
#pragma once
#include "persistent_elements.cuh"

namespace fused_rnn::cuda {

template <class G>
struct PersistentForward : BlockElements<G> {
  using Base = BlockElements<G>;
  using Base::active, Base::block, Base::exists, Base::gate_index, Base::memory_row, Base::product, Base::publish,
      Base::state;
  using Base::state_index, Base::unit_of;
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = ElementPlace<G>;

  const ForwardParams& p;
  const PersistentLaunch& l;

  __device__ __forceinline__ PersistentForward(const ForwardSequence& s, const BlockPlace& place,
                                               PersistentProduct<G>& weights)
      : Base{s.p.seq, s.p.H, place, weights, s.l.tiles, {}}, p(s.p), l(s.l) {}

  __device__ __forceinline__ float h(const Place& e, int tile) const { return Base::kept(0, e, tile); }
  __device__ __forceinline__ float c(const Place& e, int tile) const { return Base::kept(1, e, tile); }
  __device__ __forceinline__ void keep(const Place& e, int tile, float h_state, float c_state) {
    Base::keep(0, e, tile, h_state);
    if constexpr (C::kHasC) Base::keep(1, e, tile, c_state);
  }
  __device__ __forceinline__ int64_t time(int64_t step) const {
    return block.dir ? p.seq.T - 1 - l.first_step - step : l.first_step + step;
  }

  __device__ __forceinline__ int64_t later(int64_t t) const { return block.dir ? t - kPrefetchSteps : t + kPrefetchSteps; }

  // Whether the state is replaced by zeros before time t.
  __device__ __forceinline__ bool reset(const Place& e, int tile, int64_t t) const {
    return p.seq.resets && active(e, tile, t) && p.seq.resets[memory_row(e, tile, t)];
  }

  // The states before step 0, which it publishes.
  __device__ __forceinline__ void begin(int tile) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(tile, i);
      float h0 = 0.0f, c0 = 0.0f;
      if (exists(e, tile) && !reset(e, tile, time(0))) {
        h0 = state(l.first_step > 0 ? p.h_n : p.h0, e, tile);
        if constexpr (C::kHasC) c0 = l.first_step > 0 ? l.carry[state_index(e, tile)] : state(p.c0, e, tile);
      }
      if (e.mine) keep(e, tile, h0, c0);
      publish(e, tile, 0, 0, h0);
    }
  }

  // Accumulators of one element before the product: projection and biases.
  __device__ __forceinline__ void load(const Place& e, int tile, int64_t t, float (&a)[C::kSlots]) const {
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) a[slot] = 0.0f;
    if (!exists(e, tile) || !active(e, tile, t)) return;
    const auto* projection = static_cast<const Storage*>(p.gates) + gate_index(e, memory_row(e, tile, t));
    if (Base::hints(e, tile, later(t))) {
      const auto* hinted = projection + Base::rows_between(t, later(t)) * C::kSlots * p.H;
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) simt::prefetch_l2(hinted + g * p.H);
    }
    const auto* b_hh = static_cast<const Storage*>(block.dir ? p.weights[1].b_hh : p.weights[0].b_hh);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      a[g] += simt::to_float(projection[g * p.H]);
      if (b_hh) a[C::recurrent_slot(g)] += simt::to_float(b_hh[g * p.H + unit_of(e)]);
    }
  }

  // After the barrier: adds the product, applies the cell, publishes the state for the next step, stores.
  __device__ __forceinline__ void finish(const Place& e, int tile, int64_t step, float (&a)[C::kSlots], int buffer) {
    const int64_t t = time(step);
    float h_state = 0.0f, c_state = 0.0f;
    bool was_active = false;
    if (exists(e, tile)) {
      const float h_prev = h(e, tile), c_prev = C::kHasC ? c(e, tile) : 0.0f;
      was_active = active(e, tile, t);
      h_state = h_prev;
      c_state = c_prev;
      if (was_active) {
#pragma unroll
        for (int g = 0; g < C::kGates; ++g) a[C::recurrent_slot(g)] += product.sum(buffer, g, e.unit, e.b);
        C::forward(p.cell, a, h_prev, c_prev, h_state, c_state);
      }
    }
    const Storage h_stored = simt::from_float<Storage>(h_state);
    const float c_stored = c_state;
    h_state = simt::to_float(h_stored);
    if (step + 1 < l.steps) {
      if (exists(e, tile) && reset(e, tile, time(step + 1))) h_state = c_state = 0.0f;
      publish(e, tile, step + 1, 0, h_state);
    }
    if (!exists(e, tile)) return;
    keep(e, tile, h_state, c_state);
    if (was_active || !p.seq.offsets) store(e, tile, t, was_active, h_stored, c_stored, a);
  }

  // The states after the launch's last step.
  __device__ __forceinline__ void end(int tile) const {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(tile, i);
      if (!exists(e, tile)) continue;
      static_cast<Storage*>(p.h_n)[state_index(e, tile)] = simt::from_float<Storage>(h(e, tile));
      if constexpr (C::kHasC) {
        if (l.first_step + l.steps < p.seq.T) {
          l.carry[state_index(e, tile)] = c(e, tile);
        } else {
          static_cast<Storage*>(p.c_n)[state_index(e, tile)] = simt::from_float<Storage>(c(e, tile));
        }
      }
    }
  }

 private:
  // Everything kept of a row at time t; zeros where the row is inactive.
  __device__ __forceinline__ void store(const Place& e, int tile, int64_t t, bool was_active, Storage h_stored,
                                        float c_stored, const float (&a)[C::kSlots]) const {
    const int64_t row = memory_row(e, tile, t);
    const Storage zero = simt::from_float<Storage>(0.0f);
    static_cast<Storage*>(p.y)[(row * p.D + block.dir) * p.H + unit_of(e)] = was_active ? h_stored : zero;
    if (!p.training) return;
    if constexpr (C::kSaved > 0) {
      auto* gates = static_cast<Storage*>(p.gates) + gate_index(e, row);
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) {
        gates[slot * p.H] = was_active ? simt::from_float<Storage>(a[slot]) : zero;
      }
    }
    if constexpr (C::kHasC) {
      static_cast<Storage*>(p.cs)[(block.dir * p.seq.N + row) * p.H + unit_of(e)] =
          was_active ? simt::from_float<Storage>(c_stored) : zero;
    }
  }
};

template <class G>
__device__ __forceinline__ void persistent_forward(const ForwardSequence& s) {
  using Place = ElementPlace<G>;
  constexpr int kSlots = Cell<G::kCell>::kSlots;
  const BlockPlace block = block_place(s.l, s.p.seq.B);
  PersistentProduct<G> product(block.dir ? s.p.weights[1].w_hh : s.p.weights[0].w_hh, s.p.H, s.l, block.slice, block.group);
  PersistentForward<G> forward(s, block, product);

  for (int i = simt::thread_x(); i < block.tiles * kTileRows; i += kPersistentThreads) {
    product.lengths()[i] = count_active(s.p.seq, block.first_row + i);
  }
  product.exchange.start();
  simt::sync_block();
  for (int tile = 0; tile < block.tiles; ++tile) forward.begin(tile);

  int buffer = 0;
  // The planner refuses a T beyond 32 bits.
#pragma unroll 1
  for (uint32_t step = 0; step < static_cast<uint32_t>(s.l.steps); ++step) {
    const int64_t t = forward.time(step);
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      float a[Place::kPerThread][kSlots];
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) {
        forward.load(Place(tile, i), tile, t, a[i]);
      }
      typename PersistentProduct<G>::Sums sums;
      product.run(sums, tile, step);
      product.store_sums(sums, buffer);
      simt::sync_block();
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) forward.finish(Place(tile, i), tile, step, a[i], buffer);
      buffer ^= 1;
    }
  }
  for (int tile = 0; tile < block.tiles; ++tile) forward.end(tile);
}

template <class G>
__global__ void __launch_bounds__(kPersistentThreads, 1) persistent_forward_kernel(const ForwardSequence s) {
  if constexpr (simt::arch() >= (G::kCluster ? 900 : 800)) persistent_forward<G>(s);
}

}  // namespace fused_rnn::cuda
