// The pointwise half of a modified step (core/modifier.h): that of pointwise.h with what is done to the candidate, the new
// state and, by zoneout, between the state before and after. Functions of their own, which leave other steps as they are.
//
//   candidate                     g <- mask * g
//   clip                          c <- min(max(c, -clip), clip), before h is made of it; h of a cell without c
//   zoneout, of h and c alike     keep:   s <- keep ? s before : s
//                                 share:  s <- share * s before + (1 - share) * s
//   product, backward alone       dh <- mask * (d_rec W_hh) + the rest; forward multiplies rows before the product
#pragma once
#include "cpu/isa/pointwise.h"

namespace fused_rnn::cpu {

// cells.h's modifier of a vector of units.
template <class V>
struct StepModifier {
  V mask, clip, raw;  // raw: of backward, what was cut to [-clip, clip]
  V candidate(const V& v) const { return v * mask; }
  V clipped(const V& v) const { return clamp(v, V(0) - clip, clip); }
  V clip_gradient(const V& d) const {
    return select_less(clip, raw, V(0), select_less(raw, V(0) - clip, V(0), d));  // d where raw is NaN
  }
};

// Flags as numbers 0 and 1; lanes past n are 0.
template <class V>
inline V load_flags(const bool* from, int n) {
  using A = typename V::Scalar;
  A lanes[V::kWidth] = {};
  if (n >= V::kWidth) {
    for (int i = 0; i < V::kWidth; ++i) lanes[i] = static_cast<A>(from[i]);
  } else {
    for (int i = 0; i < n; ++i) lanes[i] = static_cast<A>(from[i]);
  }
  return V::load(lanes);
}

// One vector of a state's zoneout.
template <class V>
class ZoneoutUnits {
 public:
  ZoneoutUnits(const bool* keep, typename V::Scalar share, int64_t unit, int n)
      : masked_(keep), mixes_(!keep && share != 0), share_(keep ? load_flags<V>(keep + unit, n) : V(share)) {}
  // Whether backward passes a part of the gradient by the step.
  bool any() const { return masked_ || mixes_; }
  V after(const V& before, const V& after) const {
    if (masked_) return select_less(V(0), share_, before, after);
    return mixes_ ? share_ * before + (V(1) - share_) * after : after;
  }
  V to_before(const V& d) const {
    if (masked_) return select_less(V(0), share_, d, V(0));
    return mixes_ ? share_ * d : V(0);
  }
  V to_after(const V& d) const {
    if (masked_) return select_less(V(0), share_, V(0), d);
    return mixes_ ? (V(1) - share_) * d : d;
  }

 private:
  const bool masked_, mixes_;
  const V share_;
};

template <class V, class C, class Storage>
[[gnu::flatten]] void forward_modified(const ForwardCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  const StepNumbers<A>& numbers = *call.numbers;
  for_items<1>(call.n_rows, call.first, call.last, [&](const auto& items) {
    const Item item = items[0];
    const ForwardRow<A>& row = call.rows[item.row];
    const StepRow<A>& options = call.options[item.row];
    const int64_t column = (item.vector - call.first) * C::kGates * kWidth, unit = item.vector * kWidth;
    const int n = lanes_left<V>(call.H, unit);
    V a[C::kSlots], h, c = V(0), c_prev = V(0);
    for (int g = 0; g < C::kGates; ++g) {
      const V sum = V::load(call.rec + item.row * call.rec_stride + column + g * kWidth);
      const V projection = V::load(call.xg + item.row * call.xg_stride + column + g * kWidth);
      if (C::recurrent_slot(g) == g) {
        a[g] = projection + sum;
      } else {
        a[g] = projection;
        a[C::recurrent_slot(g)] = sum;
      }
    }
    const ZoneoutUnits<V> zoneout_h(options.keep_h, numbers.share_h, unit, n);
    const ZoneoutUnits<V> zoneout_c(options.keep_c, numbers.share_c, unit, n);
    const V h_prev = C::kReadsH || zoneout_h.any() ? V::load(row.h_prev + unit) : V(0);
    if constexpr (C::kHasC) c_prev = V::load(row.c_prev + unit);
    const StepModifier<V> m{options.candidate ? V::load(options.candidate + unit) : V(1), V(numbers.clip), V(0)};
    C::forward(a, h_prev, c_prev, h, c, m);
    h = zoneout_h.after(h_prev, h);
    if constexpr (C::kHasC) {
      c = zoneout_c.after(c_prev, c);
      c.store(row.c + unit);
    }
    if (row.y) {
      store_stored<V, Storage>(h, row.y, unit, n);
      if constexpr (sizeof(Storage) < sizeof(A)) h = load_stored<V, Storage>(row.y, unit, n);
    }
    h.store(row.h + unit);
    if (!row.gates) return;
    for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(a[s], row.gates, s * call.H + unit, n);
    if constexpr (C::kHasC) store_stored<V, Storage>(c, row.cs, unit, n);
  });
}

template <class V, class C, class Storage>
[[gnu::flatten]] void backward_modified(const BackwardCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  constexpr int kFirst = C::kSlots - C::kGates;
  const StepNumbers<A>& numbers = *call.numbers;
  for_items<1>(call.n_rows, call.first, call.last, [&](const auto& items) {
    const Item item = items[0];
    const BackwardRow<A>& row = call.rows[item.row];
    const StepRow<A>& options = call.options[item.row];
    const int64_t unit = item.vector * kWidth;
    const int n = lanes_left<V>(call.H, unit);
    V sum = V::load(call.rec + item.row * call.rec_stride + (item.vector - call.first) * kWidth);
    if (options.product) sum = sum * V::load(options.product + unit);
    const V dh = sum + V::load(row.carry + unit) + load_stored<V, Storage>(row.dy, unit, n);
    V a[C::kSlots], d[C::kSlots], h_prev = V(0), c_prev = V(0), dc = V(0);
    for (int s = 0; s < C::kSlots; ++s) a[s] = load_stored<V, Storage>(row.gates, s * call.H + unit, n);
    if constexpr (C::kReadsH) h_prev = load_stored<V, Storage>(row.h_prev, unit, n);
    if constexpr (C::kHasC) {
      c_prev = load_stored<V, Storage>(row.c_prev, unit, n);
      dc = V::load(row.dc + unit);
    }
    const ZoneoutUnits<V> zoneout_h(options.keep_h, numbers.share_h, unit, n);
    const ZoneoutUnits<V> zoneout_c(options.keep_c, numbers.share_c, unit, n);
    StepModifier<V> m{options.candidate ? V::load(options.candidate + unit) : V(1), V(numbers.clip), V(0)};
    m.raw = C::unclipped(a, h_prev, c_prev, m);
    const V c = m.clipped(m.raw), dc_kept = zoneout_c.to_before(dc);  // c: of a cell that has one
    dc = zoneout_c.to_after(dc);
    const V direct = C::backward(a, h_prev, c_prev, c, m.raw, zoneout_h.to_after(dh), dc, d, m);
    for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(d[s], row.d_gates, s * call.H + unit, n);
    if (row.d_rec) {
      for (int g = 0; g < C::kGates; ++g) store_stored<V, A>(d[kFirst + g], row.d_rec, g * call.H + unit, n);
    }
    if (row.carry_out) (row.reset ? V(0) : direct + zoneout_h.to_before(dh)).store(row.carry_out + unit);
    if constexpr (C::kHasC) (row.reset ? V(0) : dc + dc_kept).store(row.dc + unit);
  });
}

template <class V, class Storage, int... kKinds>
void fill_modified(Kernels<typename V::Scalar>& table, int at, std::integer_sequence<int, kKinds...>) {
  ((table.forward_modified[kKinds][at] = forward_modified<V, Cell<static_cast<CellKind>(kKinds)>, Storage>), ...);
  ((table.backward_modified[kKinds][at] = backward_modified<V, Cell<static_cast<CellKind>(kKinds)>, Storage>), ...);
}
template <class V, class Storage>
void fill_modified(Kernels<typename V::Scalar>& table, int at) {
  fill_modified<V, Storage>(table, at, std::make_integer_sequence<int, kCellCount>{});
}

}  // namespace fused_rnn::cpu
