// The recurrent part of a whole backward sequence of one layer in one launch (plan/persistent_geometry.h). In scan order
// from the last step to the first, row b active at t has
//   dh[t] = dy[t] + carry + d_rg[next] W_hh
// and the cell's derivative gives d_gates[t], the gradient of c and the part of dh that bypasses W_hh. A thread keeps, for
// its elements, carry and the gradient of c in fp32, as forward keeps its states; they begin as dh_n and dc_n. A step
// publishes zeros for d_rg where it is inactive and where the row was reset before it. So dh[t] is complete without a case
// for the end of a row, and after the first step the gradient of the initial state remains.
// Exchange k belongs to the launch's k-th step of the backward scan. With the gather product it carries d_rg, and the
// product is part of step k + 1. With the scatter product it carries the product.
#pragma once
#include "cuda/persistent/persistent_forward.cuh"

namespace fused_rnn::cuda {

template <class G>
struct PersistentBackward : BlockElements<G> {
  using Base = BlockElements<G>;
  using Base::active, Base::c_index, Base::exists, Base::first_step, Base::gate_index, Base::H, Base::length, Base::product,
      Base::publish, Base::reset, Base::row_of_batch, Base::state, Base::state_index, Base::steps, Base::time, Base::y_index;
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = PlaceOf<G>;
  // What an element needs beside the product: requested before the product, used after it.
  struct Element {
    Storage a[C::kSlots];
    Storage dy, h_prev, h, c_prev, c;
    unsigned char from_zero;  // not 0: the state was reset before the step
  };
  // What is stored of a step.
  struct Result {
    Storage d[C::kSlots];
    bool active;
  };

  const BackwardParams& p;
  const PersistentLaunch& l;

  __device__ __forceinline__ PersistentBackward(const BackwardSequence& s, const BlockPlace& place, ProductOf<G>& weights)
      : Base(s, place, weights), p(s.p), l(s.l) {}

  __device__ __forceinline__ float carry(const Place& e, int row_tile) const { return Base::held(0, e, row_tile); }
  __device__ __forceinline__ float dc(const Place& e, int row_tile) const { return Base::held(1, e, row_tile); }
  // The gradient of h (which = 0) or c (1) that one launch leaves and the next takes up.
  __device__ __forceinline__ float& carried(int which, const Place& e, int row_tile) const {
    return l.carry[which * p.D * p.seq.B * p.H + state_index(e, row_tile)];
  }
  __device__ __forceinline__ bool is_last_launch() const { return first_step + steps == p.seq.T; }
  static __device__ __forceinline__ const Storage& element(const void* tensor, uint64_t index) {
    return static_cast<const Storage*>(tensor)[index];
  }

  __device__ __forceinline__ void begin(int row_tile) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      const Place e(row_tile, i);
      if (!e.mine) continue;
      float dh = 0.0f, dc = 0.0f;
      if (exists(e, row_tile)) {
        dh = first_step > 0 ? carried(0, e, row_tile) : simt::to_float(state(p.dh_n, e, row_tile));
        if constexpr (C::kHasC) dc = first_step > 0 ? carried(1, e, row_tile) : simt::to_float(state(p.dc_n, e, row_tile));
      }
      Base::keep(0, e, row_tile, dh);
      if constexpr (C::kHasC) Base::keep(1, e, row_tile, dc);
    }
  }

  // The scan runs backwards: rows.next is the row of the step that precedes this one in forward's order.
  __device__ __forceinline__ void load(const Place& e, int row_tile, int k, const StepRows& rows, Element& x) const {
    x = Element{};
    if (!exists(e, row_tile)) return;
    const int steps_of_row = length(e, row_tile);
    if (!active(time(k), steps_of_row)) return;
    const int row = rows.now + row_of_batch(e, row_tile), previous = rows.next + row_of_batch(e, row_tile);
    if (p.dy) x.dy = element(p.dy, y_index(e, row));
    if constexpr (C::kSaved > 0) {
      const Storage* gates = &element(p.gates, gate_index(e, row));
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) x.a[slot] = gates[slot * H];
    } else {
      x.h = element(p.y, y_index(e, row));
    }
    x.from_zero = reset(e, row_tile, time(k), rows.now, steps_of_row);
    // A reset row uses neither h_prev nor c_prev.
    const bool from_row = active(time(k + 1), steps_of_row);
    if constexpr (C::kReadsH) {
      x.h_prev = from_row ? element(p.y, y_index(e, previous)) : state(p.h0, e, row_tile);
    }
    if constexpr (C::kHasC) {
      x.c = element(p.cs, c_index(e, row));
      x.c_prev = from_row ? element(p.cs, c_index(e, previous)) : state(p.c0, e, row_tile);
    }
    const int ahead = row + rows.ahead(kPrefetchSteps);
    if (active(time(k + kPrefetchSteps), steps_of_row) && Base::hints(e, ahead)) prefetch(e, ahead);
  }

  // Hints that a row of memory will be read.
  __device__ __forceinline__ void prefetch(const Place& e, int row) const {
    if (p.dy) simt::prefetch_l2(&element(p.dy, y_index(e, row)));
    if constexpr (C::kSaved > 0) {
      const Storage* gates = &element(p.gates, gate_index(e, row));
#pragma unroll
      for (int slot = 0; slot < C::kSaved; ++slot) simt::prefetch_l2(gates + slot * H);
    }
    if constexpr (C::kHasC) {
      simt::prefetch_l2(&element(p.cs, c_index(e, row)));
    } else {
      simt::prefetch_l2(&element(p.y, y_index(e, row)));
    }
  }

  // Whether the gradients of step k are needed: by the step after it in the scan, by the next launch, or, at the end of the
  // sequence, for d_h0.
  __device__ __forceinline__ bool has_exchange(int k) const { return k + 1 < steps || !is_last_launch() || p.d_h0; }

  // One element of the product of W_hh and the d_rg of step k - 1.
  __device__ __forceinline__ float product_sum(const Place& e, int row_tile, int k, int buffer) const {
    if constexpr (G::kScatters) {
      return product.sum(e.unit, e.b, row_tile, k - 1);
    } else {
      return product.sum(buffer, 0, e);
    }
  }

  // Adds the product (if there is one) to one element, applies the derivative, hands d_rg to the next product.
  __device__ __forceinline__ void finish(const Place& e, int row_tile, int k, const Element& x, int buffer, Result& result) {
    if (!e.mine) return;
    result.active = Base::takes_part(e, row_tile, time(k));
    float d[C::kSlots] = {}, dh = carry(e, row_tile), dc_state = C::kHasC ? dc(e, row_tile) : 0.0f;
    // Nobody asks for the product of an inactive row that no exchange follows.
    if (k > 0 && (result.active || has_exchange(k))) dh += product_sum(e, row_tile, k, buffer);
    simt::issue_loads();
    if (result.active) {
      float a[C::kSlots];
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) a[slot] = simt::to_float(x.a[slot]);
      const float h_prev = x.from_zero ? 0.0f : simt::to_float(x.h_prev);
      const float c_prev = x.from_zero ? 0.0f : simt::to_float(x.c_prev);
      const float bypass = C::backward(p.cell, a, h_prev, c_prev, simt::to_float(x.c), simt::to_float(x.h),
                                       dh + simt::to_float(x.dy), dc_state, d);
      dh = x.from_zero ? 0.0f : bypass;
      if (x.from_zero) dc_state = 0.0f;
    } else {
      // Zero, computed from dh so that product_sum's loads finish before the barrier after which others overwrite that
      // memory.
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) d[slot] = dh == dh ? 0.0f : -0.0f;
    }
    Base::keep(0, e, row_tile, dh);
    if constexpr (C::kHasC) Base::keep(1, e, row_tile, dc_state);
    // The product takes d_rg as it is stored, rounded.
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) result.d[slot] = simt::from_float<Storage>(d[slot]);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      if (!has_exchange(k)) break;
      const float d_rg = x.from_zero ? 0.0f : simt::to_float(result.d[C::kSlots - C::kGates + g]);
      if constexpr (G::kScatters) {
        product.put(buffer, g, e.unit, e.b, d_rg);
      } else {
        publish(e, row_tile, k, g, d_rg);
      }
    }
  }

  // Stores the gradients of a step whose first row of memory is `first`; zeros where a row is inactive.
  __device__ __forceinline__ void store(const Place& e, int row_tile, int first, const Result& result) const {
    if (!exists(e, row_tile) || (!result.active && p.seq.offsets)) return;
    auto* d_gates = static_cast<Storage*>(p.d_gates) + gate_index(e, simt::opaque(first + row_of_batch(e, row_tile)));
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) d_gates[slot * H] = result.d[slot];
  }

  // Waits until product_sum may be called. With the gather product, the product is made here.
  __device__ __forceinline__ void await_product(int row_tile, int k, int buffer) const {
    if constexpr (G::kScatters) {
      product.exchange.begin(row_tile, k - 1);
    } else {
      typename ProductOf<G>::Sums sums;
      product.run(sums, row_tile, k - 1);
      product.store_sums(sums, buffer);
      simt::sync_block();
    }
  }

  // The gradients of the states of a row tile, after the product with the gradients of the launch's last step, if there is
  // one.
  __device__ __forceinline__ void end(int row_tile, int half, int buffer) const {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) end_element(Place(half, i), row_tile, buffer);
  }

 private:
  __device__ __forceinline__ void end_element(const Place& e, int row_tile, int buffer) const {
    if (!exists(e, row_tile)) return;
    const bool goes_on = !is_last_launch();
    if (goes_on || p.d_h0) {
      const float dh = carry(e, row_tile) + product_sum(e, row_tile, steps, buffer);
      if (goes_on) {
        carried(0, e, row_tile) = dh;
      } else {
        static_cast<Storage*>(p.d_h0)[state_index(e, row_tile)] = simt::from_float<Storage>(dh);
      }
    }
    if constexpr (C::kHasC) {
      if (goes_on) {
        carried(1, e, row_tile) = dc(e, row_tile);
      } else {
        static_cast<Storage*>(p.d_c0)[state_index(e, row_tile)] = simt::from_float<Storage>(dc(e, row_tile));
      }
    }
  }
};

// With the scatter product, multiplies the gradients of step k, which all threads have put, and sends the sums to their
// owners. product: that of `backward`; read through `backward`, it costs the cluster kernel of fp32 GRU with 32 units 4
// registers (nvcc 13.0, sm_90a).
template <class G>
__device__ __forceinline__ void scatter(const PersistentBackward<G>& backward, const ProductOf<G>& product, int row_tile,
                                        int k, int buffer) {
  if constexpr (G::kScatters) {
    if (backward.has_exchange(k)) {
      simt::sync_block();
      product.run(buffer, row_tile, k);
    }
  }
}

// The loop over steps and row tiles, one function for each schedule. rows: of step 0. The turns after the last step finish
// the gradients of the states.
template <class G>
__device__ __forceinline__ void run_plain(PersistentBackward<G>& backward, const ProductOf<G>& product,
                                          const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  typename PersistentBackward<G>::Element x[Place::kPerThread];
  int buffer = 0;
#pragma unroll 1
  for (int k = 0; k <= backward.steps; ++k) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      const bool is_over = k == backward.steps;
      if (!is_over) load_elements(backward, x, row_tile, row_tile, k, rows);
      if (k > 0 && backward.has_exchange(k - 1)) backward.await_product(row_tile, k, buffer);
      if (is_over) {
        backward.end(row_tile, row_tile, buffer);
        buffer ^= 1;
        continue;
      }
      const NextTurn next(block, row_tile, k, backward.steps);
      typename PersistentBackward<G>::Result results[Place::kPerThread];
#pragma unroll
      for (int i = 0; i < Place::kPerThread; ++i) {
        backward.finish(Place(row_tile, i), row_tile, k, x[i], buffer, results[i]);
        backward.store(Place(row_tile, i), row_tile, rows.now, results[i]);
      }
      scatter(backward, product, row_tile, k, buffer);
      if (!next.same_step) rows.advance(backward.seq, backward.time(k + 3));
      buffer ^= 1;
    }
  }
}

template <class G>
__device__ __forceinline__ void run_early(PersistentBackward<G>& backward, const ProductOf<G>& product,
                                          const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  typename PersistentBackward<G>::Element x[1];
  load_elements(backward, x, 0, 0, 0, rows);
  int buffer = 0;
#pragma unroll 1
  for (int k = 0; k <= backward.steps; ++k) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      if (k > 0 && backward.has_exchange(k - 1)) backward.await_product(row_tile, k, buffer);
      if (k == backward.steps) {
        backward.end(row_tile, row_tile, buffer);
        buffer ^= 1;
        continue;
      }
      const NextTurn next(block, row_tile, k, backward.steps);
      const int row = rows.now;
      typename PersistentBackward<G>::Result result;
      backward.finish(Place(row_tile, 0), row_tile, k, x[0], buffer, result);
      scatter(backward, product, row_tile, k, buffer);
      if (!next.same_step) rows.advance(backward.seq, backward.time(k + 3));
      if (next.exists) load_elements(backward, x, next.row_tile, next.row_tile, next.same_step ? k : k + 1, rows);
      backward.store(Place(row_tile, 0), row_tile, row, result);
      buffer ^= 1;
    }
  }
}

template <class G>
__device__ __forceinline__ void run_alternate(PersistentBackward<G>& backward, const ProductOf<G>& product,
                                              const BlockPlace& block, StepRows& rows) {
  using Place = ElementPlace<G>;
  typename PersistentBackward<G>::Element x[1];
  load_elements(backward, x, 0, 0, 0, rows);
  int buffer = 0;  // parity of the turns made: the buffer in use, and the half whose turn it is
#pragma unroll 1
  for (int k = 0; k <= backward.steps; ++k) {
#pragma unroll 1
    for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) {
      if (k > 0 && backward.has_exchange(k - 1)) backward.await_product(row_tile, k, buffer);
      if (k == backward.steps) {
        // The row tile's last turn was row_tiles ago, so that its half is known by that parity.
        backward.end(row_tile, buffer + block.row_tiles, buffer);
        buffer ^= 1;
        continue;
      }
      const NextTurn next(block, row_tile, k, backward.steps);
      const int row = rows.now;
      typename PersistentBackward<G>::Result result;
      if (const Place e(buffer, 0); e.mine) {
        backward.finish(e, row_tile, k, x[0], buffer, result);
      } else if (next.exists) {
        load_elements(backward, x, buffer ^ 1, next.row_tile, next.same_step ? k : k + 1,
                      next.same_step ? rows : rows.following());
      }
      scatter(backward, product, row_tile, k, buffer);
      backward.store(Place(buffer, 0), row_tile, row, result);
      if (!next.same_step) rows.advance(backward.seq, backward.time(k + 3));
      buffer ^= 1;
    }
  }
}

template <class G>
__device__ __forceinline__ void persistent_backward(const BackwardSequence& s) {
  const BlockPlace block = block_place(s.l, s.p.seq.B);
  const void* const w_hh = block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data;
  ProductOf<G> product(w_hh, s.p.H, s.l, block.slice, block.group);
  PersistentBackward<G> backward(s, block, product);
  load_lengths(product, s.p.seq, block);
  product.exchange.start();
  simt::sync_block();
  for (int row_tile = 0; row_tile < block.row_tiles; ++row_tile) backward.begin(row_tile);
  StepRows rows(s.p.seq, [&](int k) { return backward.time(k); });
  if constexpr (ElementPlace<G>::kSchedule == Schedule::kPlain) {
    run_plain(backward, product, block, rows);
  } else if constexpr (ElementPlace<G>::kSchedule == Schedule::kEarly) {
    run_early(backward, product, block, rows);
  } else {
    run_alternate(backward, product, block, rows);
  }
}

template <class G>
__global__ void __launch_bounds__(kPersistentThreads, 1) persistent_backward_kernel(const BackwardSequence s) {
  if constexpr (simt::arch() >= (G::kCluster ? 900 : 800)) persistent_backward<G>(s);
}

}  // namespace fused_rnn::cuda
