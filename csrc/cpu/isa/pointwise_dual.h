// The pointwise half of a step in derivatives of derivatives: cells.h on dual numbers of vectors of units (core/dual.h).
#pragma once
#include "core/dual.h"
#include "cpu/isa/pointwise.h"

namespace fused_rnn::cpu {

// The step of a scan of tangents. rec, xg and the row's arrays are tangents, those in call.primal values.
template <class V, class C>
[[gnu::flatten]] void tangent_pointwise(const ForwardCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  for (int r = 0; r < call.n_rows; ++r) {
    const ForwardRow<A>& row = call.rows[r];
    const PrimalRow& primal = call.primal[r];
    for (int64_t v = call.first; v < call.last; ++v) {
      const int64_t unit = v * kWidth, column = (v - call.first) * C::kGates * kWidth;
      const int n = lanes_left<V>(call.H, unit);
      Dual<V> a[C::kSlots], h, c(0), h_prev(0), c_prev(0);
      for (int s = 0; s < C::kSlots; ++s) {
        a[s] = {load_stored<V, A>(C::kSaved > 0 ? primal.gates : primal.y, s * call.H + unit, n), V(0)};
        if (primal.source) a[s].tangent = load_stored<V, A>(primal.source, s * call.H + unit, n);
      }
      for (int g = 0; g < C::kGates; ++g) {
        const V sum = V::load(call.rec + r * call.rec_stride + column + g * kWidth);
        const V projection = V::load(call.xg + r * call.xg_stride + column + g * kWidth);
        a[g].tangent = a[g].tangent + projection;
        V& recurrent = a[C::recurrent_slot(g)].tangent;
        recurrent = recurrent + sum;
      }
      C::tangents(a);
      if constexpr (C::kReadsH) h_prev = {load_stored<V, A>(primal.h_prev, unit, n), V::load(row.h_prev + unit)};
      if constexpr (C::kHasC) c_prev = {load_stored<V, A>(primal.c_prev, unit, n), V::load(row.c_prev + unit)};
      C::states(a, h_prev, c_prev, h, c);
      if constexpr (C::kHasC) {
        c.tangent.store(row.c + unit);
        store_stored<V, A>(c.tangent, row.cs, unit, n);
      }
      if (row.y) store_stored<V, A>(h.tangent, row.y, unit, n);
      h.tangent.store(row.h + unit);
      if constexpr (C::kSaved > 0) {
        for (int s = 0; s < C::kSlots; ++s) store_stored<V, A>(a[s].tangent, row.gates, s * call.H + unit, n);
      }
    }
  }
}

template <class V, class C>
[[gnu::flatten]] void dual_backward_pointwise(const DualCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  for (int r = 0; r < call.n_rows; ++r) {
    const BackwardRow<A>&value = call.rows[r].value, &tangent = call.rows[r].tangent;
    for (int64_t v = call.first; v < call.last; ++v) {
      const int64_t unit = v * kWidth;
      const int n = lanes_left<V>(call.H, unit);
      const auto stored = [&](const void* of_value, const void* of_tangent, int64_t at) -> Dual<V> {
        return {load_stored<V, A>(of_value, at, n), load_stored<V, A>(of_tangent, at, n)};
      };
      Dual<V> dh{V(0), V::load(call.rows[r].rec + unit) + V::load(tangent.carry + unit)};
      if (value.dh) {
        dh.value = load_stored<V, A>(value.dh, unit, n);
      } else {
        dh.value = V::load(call.rec + r * call.rec_stride + (v - call.first) * kWidth) + V::load(value.carry + unit) +
                   load_stored<V, A>(value.dy, unit, n);
      }
      if (tangent.dy) dh.tangent = dh.tangent + load_stored<V, A>(tangent.dy, unit, n);
      Dual<V> a[C::kSlots], d[C::kSlots], h_prev(0), c_prev(0), c(0), h(0), dc(0);
      if constexpr (C::kSaved > 0) {
        for (int s = 0; s < C::kSlots; ++s) a[s] = stored(value.gates, tangent.gates, s * call.H + unit);
      } else {
        a[0] = Dual<V>(0);
        h = stored(value.y, tangent.y, unit);
      }
      if constexpr (C::kReadsH) h_prev = stored(value.h_prev, tangent.h_prev, unit);
      if constexpr (C::kHasC) {
        c_prev = stored(value.c_prev, tangent.c_prev, unit);
        c = stored(value.c, tangent.c, unit);
        dc = {V::load(value.dc + unit), V::load(tangent.dc + unit)};
      }
      const Dual<V> direct = C::backward(a, h_prev, c_prev, c, h, dh, dc, d);
      for (int s = 0; s < C::kSlots; ++s) {
        store_stored<V, A>(d[s].value, value.d_gates, s * call.H + unit, n);
        store_stored<V, A>(d[s].tangent, tangent.d_gates, s * call.H + unit, n);
      }
      if (value.carry_out) {
        (value.reset ? V(0) : direct.value).store(value.carry_out + unit);
        (value.reset ? V(0) : direct.tangent).store(tangent.carry_out + unit);
      }
      if constexpr (C::kHasC) {
        (value.reset ? V(0) : dc.value).store(value.dc + unit);
        (value.reset ? V(0) : dc.tangent).store(tangent.dc + unit);
      }
    }
  }
}

template <class V, int... kKinds>
void fill_dual(Kernels<typename V::Scalar>& table, std::integer_sequence<int, kKinds...>) {
  ((table.tangents[kKinds] = tangent_pointwise<V, Cell<static_cast<CellKind>(kKinds)>>), ...);
  ((table.dual_backward[kKinds] = dual_backward_pointwise<V, Cell<static_cast<CellKind>(kKinds)>>), ...);
}
template <class V>
void fill_dual(Kernels<typename V::Scalar>& table) {
  fill_dual<V>(table, std::make_integer_sequence<int, kCellCount>{});
}

}  // namespace fused_rnn::cpu
