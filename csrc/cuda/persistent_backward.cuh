// The recurrent part of a whole backward sequence of one layer in one launch (persistent.h has the geometry). In scan order from
// the last step to the first, row b active at t has
//   dh[t] = dy[t] + carry + d_rg[next] W_hh
// and the cell's derivative gives d_gates[t], the gradient of c and the part of dh that bypasses W_hh. A thread keeps, for its
// elements, carry and the gradient of c in fp32, in registers or in shared memory that no other thread touches. At first they are dh_n and dc_n;
// a step before which the row was reset, or at which it is inactive, publishes zeros for d_rg. Then dh[t] is complete without
// a case for the end of a row, and what remains after the first step is the gradient of the initial state.
// Exchange k belongs to the launch's k-th step of the backward scan. With the gather product it carries d_rg, and the product is part of
// step k + 1; with the scatter product it carries the product.
#pragma once
#include "persistent_forward.cuh"

namespace fused_rnn::cuda {

template <class G>
struct PersistentBackward : BlockElements<G> {
  using Base = BlockElements<G>;
  using Base::active, Base::block, Base::exists, Base::gate_index, Base::memory_row, Base::product, Base::publish,
      Base::state;
  using Base::state_index, Base::unit_of;
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = ElementPlace<G>;
  // What an element needs beside the product, requested before it.
  struct Element {
    float a[C::kSlots];
    float dy, h_prev, h, c_prev, c;
  };

  const BackwardParams& p;
  const PersistentLaunch& l;

  __device__ __forceinline__ PersistentBackward(const BackwardSequence& s, const BlockPlace& place, ProductOf<G>& weights)
      : Base{s.p.seq, s.p.H, place, weights, s.l.tiles, {}}, p(s.p), l(s.l) {}

  __device__ __forceinline__ float carry(const Place& e, int tile) const { return Base::kept(0, e, tile); }
  __device__ __forceinline__ float dc(const Place& e, int tile) const { return Base::kept(1, e, tile); }
  __device__ __forceinline__ int64_t time(int64_t k) const {
    return block.dir ? l.first_step + k : p.seq.T - 1 - l.first_step - k;
  }
  // What the launch before left, and this one leaves, of the gradient of h (0) or c (1).
  __device__ __forceinline__ float& carried(int which, const Place& e, int tile) const {
    return l.carry[which * p.D * p.seq.B * p.H + state_index(e, tile)];
  }
  __device__ __forceinline__ bool is_last_launch() const { return l.first_step + l.steps == p.seq.T; }
  __device__ __forceinline__ float output(const void* tensor, int64_t row, const Place& e) const {
    return simt::to_float(static_cast<const Storage*>(tensor)[(row * p.D + block.dir) * p.H + unit_of(e)]);
  }

  __device__ __forceinline__ void begin(int tile) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(tile, i);
      if (!e.mine) continue;
      float dh = 0.0f, dc = 0.0f;
      if (exists(e, tile)) {
        dh = l.first_step > 0 ? carried(0, e, tile) : state(p.dh_n, e, tile);
        if constexpr (C::kHasC) dc = l.first_step > 0 ? carried(1, e, tile) : state(p.dc_n, e, tile);
      }
      Base::keep(0, e, tile, dh);
      if constexpr (C::kHasC) Base::keep(1, e, tile, dc);
    }
  }

  __device__ __forceinline__ void load(const Place& e, int tile, int64_t t, Element& x) const {
    x = Element{};
    if (!exists(e, tile) || !active(e, tile, t)) return;
    const int64_t row = memory_row(e, tile, t), previous = block.dir ? t + 1 : t - 1;
    if (p.dy) x.dy = output(p.dy, row, e);
    if constexpr (C::kSaved > 0) {
      const auto* gates = static_cast<const Storage*>(p.gates) + gate_index(e, row);
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) x.a[slot] = simt::to_float(gates[slot * p.H]);
    } else {
      x.h = output(p.y, row, e);
    }
    const bool from_zero = is_reset(p.seq, row), from_row = active(e, tile, previous);
    if constexpr (G::kCell == CellKind::kGru) {
      if (!from_zero) x.h_prev = from_row ? output(p.y, memory_row(e, tile, previous), e) : state(p.h0, e, tile);
    }
    if constexpr (C::kHasC) {
      const auto* cs = static_cast<const Storage*>(p.cs) + block.dir * p.seq.N * p.H + unit_of(e);
      x.c = simt::to_float(cs[row * p.H]);
      if (!from_zero) {
        x.c_prev = from_row ? simt::to_float(cs[memory_row(e, tile, previous) * p.H]) : state(p.c0, e, tile);
      }
    }
  }

  // For a later step.
  __device__ __forceinline__ void prefetch(const Place& e, int tile, int64_t t) const {
    if (!exists(e, tile) || !Base::hints(e, tile, t)) return;
    const int64_t row = memory_row(e, tile, t), output = (row * p.D + block.dir) * p.H + unit_of(e);
    if (p.dy) simt::prefetch_l2(static_cast<const Storage*>(p.dy) + output);
    if constexpr (C::kSaved > 0) {
      const auto* gates = static_cast<const Storage*>(p.gates) + gate_index(e, row);
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) simt::prefetch_l2(gates + slot * p.H);
    }
    if constexpr (C::kHasC) {
      simt::prefetch_l2(static_cast<const Storage*>(p.cs) + (block.dir * p.seq.N + row) * p.H + unit_of(e));
    } else {
      simt::prefetch_l2(static_cast<const Storage*>(p.y) + output);
    }
  }

  // Exchange k carries the gradients of step k on to the step before it; the sequence's last one serves d_h0 alone.
  __device__ __forceinline__ bool has_exchange(int64_t k) const { return k + 1 < l.steps || !is_last_launch() || p.d_h0; }

  // d_rg of exchange k - 1 times W_hh, of one element.
  __device__ __forceinline__ float product_sum(const Place& e, int tile, int64_t k, int buffer) const {
    if constexpr (G::kScatters) {
      return product.sum(e.unit, e.b, tile, k - 1);
    } else {
      return product.sum(buffer, 0, e.unit, e.b);
    }
  }

  // One element: adds the product (if there was one), applies the derivative, hands d_rg to the next product, stores.
  __device__ __forceinline__ void finish(const Place& e, int tile, int64_t k, const Element& x, int buffer) {
    const int64_t t = time(k);
    float d[C::kSlots] = {};
    bool was_active = false, from_zero = false;
    if (exists(e, tile)) {
      was_active = active(e, tile, t);
      from_zero = was_active && is_reset(p.seq, memory_row(e, tile, t));
      float dh = carry(e, tile), bypass = 0.0f;
      if (k > 0) dh += product_sum(e, tile, k, buffer);
      if (was_active) {
        float dc_state = C::kHasC ? dc(e, tile) : 0.0f;
        C::backward(p.cell, x.a, x.h_prev, x.c_prev, x.c, x.h, dh + x.dy, dc_state, d, bypass);
        if constexpr (C::kHasC) Base::keep(1, e, tile, from_zero ? 0.0f : dc_state);
        dh = from_zero ? 0.0f : bypass;
      }
      Base::keep(0, e, tile, dh);
    }
    // What goes through the weights, as it is stored.
    Storage stored[C::kSlots];
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) stored[slot] = simt::from_float<Storage>(d[slot]);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      if (!has_exchange(k)) break;
      const float d_rg = from_zero ? 0.0f : simt::to_float(stored[C::kSlots - C::kGates + g]);
      if constexpr (G::kScatters) {
        if (e.mine) product.put(buffer, g, e.unit, e.b, d_rg);
      } else {
        publish(e, tile, k, g, d_rg);
      }
    }
    if (!exists(e, tile) || (!was_active && p.seq.offsets)) return;
    auto* d_gates = static_cast<Storage*>(p.d_gates) + gate_index(e, memory_row(e, tile, t));
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) d_gates[slot * p.H] = stored[slot];
  }

  // Until product_sum is there; with the gather product, this makes it.
  __device__ __forceinline__ void await_product(int tile, int64_t k, int buffer) const {
    if constexpr (G::kScatters) {
      product.exchange.begin(tile, k - 1);
    } else {
      typename ProductOf<G>::Sums sums;
      product.run(sums, tile, k - 1);
      product.store_sums(sums, buffer);
      simt::sync_block();
    }
  }

  // After the product with the gradients of the launch's last step, if there is one.
  __device__ __forceinline__ void end(const Place& e, int tile, int buffer) const {
    if (!exists(e, tile)) return;
    const bool goes_on = !is_last_launch();
    if (goes_on || p.d_h0) {
      const float dh = carry(e, tile) + product_sum(e, tile, l.steps, buffer);
      if (goes_on) {
        carried(0, e, tile) = dh;
      } else {
        static_cast<Storage*>(p.d_h0)[state_index(e, tile)] = simt::from_float<Storage>(dh);
      }
    }
    if constexpr (C::kHasC) {
      if (goes_on) {
        carried(1, e, tile) = dc(e, tile);
      } else {
        static_cast<Storage*>(p.d_c0)[state_index(e, tile)] = simt::from_float<Storage>(dc(e, tile));
      }
    }
  }
};

template <class G>
__device__ __forceinline__ void persistent_backward(const BackwardSequence& s) {
  using Place = ElementPlace<G>;
  using Element = typename PersistentBackward<G>::Element;
  const BlockPlace block = block_place(s.l, s.p.seq.B);
  ProductOf<G> product(block.dir ? s.p.weights[1].w_hh : s.p.weights[0].w_hh, s.p.H, s.l, block.slice, block.group);
  PersistentBackward<G> backward(s, block, product);

  for (int i = simt::thread_x(); i < block.tiles * kTileRows; i += kPersistentThreads) {
    product.lengths()[i] = count_active(s.p.seq, block.first_row + i);
  }
  product.exchange.start();
  simt::sync_block();
  for (int tile = 0; tile < block.tiles; ++tile) backward.begin(tile);

  int buffer = 0;
#pragma unroll 1
  for (uint32_t k = 0; k <= static_cast<uint32_t>(s.l.steps); ++k) {
#pragma unroll 1
    for (int tile = 0; tile < block.tiles; ++tile) {
      const bool last = k == static_cast<uint32_t>(s.l.steps);
      Element elements[Place::kPerThread];
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) {
        if (!last) {
          backward.load(Place(tile, i), tile, backward.time(k), elements[i]);
          backward.prefetch(Place(tile, i), tile, backward.time(k + kPrefetchSteps));
        }
      }
      if (k > 0 && backward.has_exchange(k - 1)) backward.await_product(tile, k, buffer);
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) {
        if (last) {
          backward.end(Place(tile, i), tile, buffer);
        } else {
          backward.finish(Place(tile, i), tile, k, elements[i], buffer);
        }
      }
      if constexpr (G::kScatters) {
        if (!last && backward.has_exchange(k)) {
          simt::sync_block();
          product.run(buffer, tile, k);
        }
      }
      buffer ^= 1;
    }
  }
}

template <class G>
__global__ void __launch_bounds__(kPersistentThreads, 1) persistent_backward_kernel(const BackwardSequence s) {
  if constexpr (simt::arch() >= (G::kCluster ? 900 : 800)) persistent_backward<G>(s);
}

}  // namespace fused_rnn::cuda
