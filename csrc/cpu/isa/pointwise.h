// The pointwise half of a step, on the sums of a tile: cells.h on vectors of units. Loads and stores convert the storage.
#pragma once
#include <type_traits>
#include <utility>

#include "core/cells.h"
#include "cpu/isa/kernels.h"
#include "cpu/isa/simd_math.h"
#include "cpu/isa/tile.h"

namespace fused_rnn::cpu {

// One vector of an array in storage: lanes past n are read as zeros and not written.
template <class V, class Storage>
inline V load_stored(const void* base, int64_t index, int n) {
  const Storage* from = static_cast<const Storage*>(base) + index;
  return n >= V::kWidth ? V::load(from) : V::load_partial(from, n);
}
template <class V, class Storage>
inline void store_stored(V value, void* base, int64_t index, int n) {
  Storage* to = static_cast<Storage*>(base) + index;
  if (n >= V::kWidth) {
    value.store(to);
  } else {
    value.store_partial(to, n);
  }
}
template <class V>
inline int lanes_left(int64_t size, int64_t at) {
  return static_cast<int>(size - at < V::kWidth ? size - at : V::kWidth);
}

// A vector of units of a row.
struct Item {
  int row;
  int64_t vector;
};
// Calls f(items) for all vectors [first, last) of units of all rows: kInStep at a time, then one by one.
template <int kInStep, class F>
inline void for_items(int n_rows, int64_t first, int64_t last, F&& f) {
  Item at{0, first};
  const auto next = [&] {
    const Item item = at;
    if (++at.vector == last) at = {at.row + 1, first};
    return item;
  };
  int64_t left = n_rows * (last - first);
  for (; left >= kInStep; left -= kInStep) {
    Item items[kInStep];
    for (Item& item : items) item = next();
    f(items);
  }
  for (; left > 0; --left) {
    const Item items[] = {next()};
    f(items);
  }
}

// Computes several items in step, so that their chains of dependent instructions hide each other's latency. A vector of
// units of an LSTM takes 26 ns in fours and 36 ns one by one, of a GRU 17 and 26 ns (bfloat16, Sapphire Rapids,
// 2026-11-21).
template <class V, class C, class Storage, bool kSave, int kItems>
inline void forward_items(const ForwardCall<typename V::Scalar>& call, const Item (&items)[kItems]) {
  using A = typename V::Scalar;
  using Units = simd::Several<V, kItems, V::kShort && std::is_same_v<Storage, BFloat16>>;
  constexpr int kWidth = V::kWidth;
  Units a[C::kSlots], h, c = Units(0), c_prev = Units(0), h_prev = Units(0);
  for (int i = 0; i < kItems; ++i) {
    const ForwardRow<A>& row = call.rows[items[i].row];
    const int64_t column = (items[i].vector - call.first) * C::kGates * kWidth, unit = items[i].vector * kWidth;
    for (int g = 0; g < C::kGates; ++g) {
      const V sum = V::load(call.rec + items[i].row * call.rec_stride + column + g * kWidth);
      const V projection = V::load(call.xg + items[i].row * call.xg_stride + column + g * kWidth);
      if (C::recurrent_slot(g) == g) {
        a[g].v[i] = projection + sum;
      } else {
        a[g].v[i] = projection;
        a[C::recurrent_slot(g)].v[i] = sum;
      }
    }
    if constexpr (C::kHasC) c_prev.v[i] = V::load(row.c_prev + unit);
    if constexpr (C::kReadsH) h_prev.v[i] = V::load(row.h_prev + unit);
  }
  C::forward(a, h_prev, c_prev, h, c);
  for (int i = 0; i < kItems; ++i) {
    const ForwardRow<A>& row = call.rows[items[i].row];
    const int64_t unit = items[i].vector * kWidth;
    const int n = lanes_left<V>(call.H, unit);
    if constexpr (C::kHasC) c.v[i].store(row.c + unit);
    if (row.y) {
      store_stored<V, Storage>(h.v[i], row.y, unit, n);
      if constexpr (sizeof(Storage) < sizeof(A)) h.v[i] = load_stored<V, Storage>(row.y, unit, n);
    }
    h.v[i].store(row.h + unit);
    if constexpr (kSave) {
      for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(a[s].v[i], row.gates, s * call.H + unit, n);
      if constexpr (C::kHasC) store_stored<V, Storage>(c.v[i], row.cs, unit, n);
    }
  }
}

template <class V, class C, class Storage>
[[gnu::flatten]] void forward_pointwise(const ForwardCall<typename V::Scalar>& call) {
  if (C::kSaved > 0 && call.rows[0].gates) {
    // One by one: the gates of several items, which are saved, would not stay in registers.
    for_items<1>(call.n_rows, call.first, call.last,
                 [&](const auto& items) { forward_items<V, C, Storage, (C::kSaved > 0)>(call, items); });
  } else {
    for_items<V::kInStep>(call.n_rows, call.first, call.last,
                          [&](const auto& items) { forward_items<V, C, Storage, false>(call, items); });
  }
}

template <class V, class C, class Storage>
[[gnu::flatten]] void backward_pointwise(const BackwardCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  constexpr int kFirst = C::kSlots - C::kGates;
  for (int r = 0; r < call.n_rows; ++r) {
    const BackwardRow<A>& row = call.rows[r];
    for (int64_t v = call.first; v < call.last; ++v) {
      const int64_t unit = v * kWidth;
      const int n = lanes_left<V>(call.H, unit);
      V dh = V::load(call.rec + r * call.rec_stride + (v - call.first) * kWidth) + V::load(row.carry + unit) +
             load_stored<V, Storage>(row.dy, unit, n);
      if (row.dh) store_stored<V, Storage>(dh, row.dh, unit, n);
      V a[C::kSlots], d[C::kSlots], h_prev = V(0), c_prev = V(0), c = V(0), h = V(0), dc = V(0);
      if constexpr (C::kSaved > 0) {
        for (int s = 0; s < C::kSlots; ++s) a[s] = load_stored<V, Storage>(row.gates, s * call.H + unit, n);
      } else {
        a[0] = V(0);
        h = load_stored<V, Storage>(row.y, unit, n);
      }
      if constexpr (C::kReadsH) h_prev = load_stored<V, Storage>(row.h_prev, unit, n);
      if constexpr (C::kHasC) {
        c_prev = load_stored<V, Storage>(row.c_prev, unit, n);
        c = load_stored<V, Storage>(row.c, unit, n);
        dc = V::load(row.dc + unit);
      }
      const V direct = C::backward(a, h_prev, c_prev, c, h, dh, dc, d);
      for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(d[s], row.d_gates, s * call.H + unit, n);
      if (row.d_rec) {
        for (int g = 0; g < C::kGates; ++g) store_stored<V, A>(d[kFirst + g], row.d_rec, g * call.H + unit, n);
      }
      if (row.carry_out) (row.reset ? V(0) : direct).store(row.carry_out + unit);
      if constexpr (C::kHasC) (row.reset ? V(0) : dc).store(row.dc + unit);
    }
  }
}

template <class V, class Storage>
[[gnu::flatten]] void store_rows(const StoreCall<typename V::Scalar>& call) {
  constexpr int kWidth = V::kWidth;
  for (int r = 0; r < call.n_rows; ++r) {
    const StoreRow<typename V::Scalar>& row = call.rows[r];
    for (int64_t v = call.first; v < call.last; ++v) {
      const int64_t at = v * kWidth;
      const int n = lanes_left<V>(call.size, at);
      V value = V::load(call.rec + r * call.rec_stride + (v - call.first) * kWidth);
      if (row.scale) value = value * V::load(row.scale + at);
      if (row.add) value = value + V::load(row.add + at);
      if (row.add_stored) value = value + load_stored<V, Storage>(row.add_stored, at, n);
      if (row.out) {
        store_stored<V, Storage>(value, row.out, at, n);
        if (call.rounded) value = load_stored<V, Storage>(row.out, at, n);
      }
      if (row.out_arithmetic) value.store(row.out_arithmetic + at);
    }
  }
}

template <class V, class Storage>
[[gnu::flatten]] void load_array(const void* from, typename V::Scalar* to, int64_t n) {
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int lanes = lanes_left<V>(n, i);
    store_stored<V, typename V::Scalar>(load_stored<V, Storage>(from, i, lanes), to, i, lanes);
  }
}
template <class V, class Storage>
[[gnu::flatten]] void save_array(const typename V::Scalar* from, void* to, int64_t n) {
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int lanes = lanes_left<V>(n, i);
    store_stored<V, Storage>(load_stored<V, typename V::Scalar>(from, i, lanes), to, i, lanes);
  }
}

template <class V, class Storage, int... kKinds>
void fill_cells(Kernels<typename V::Scalar>& table, int at, std::integer_sequence<int, kKinds...>) {
  ((table.forward[kKinds][at] = forward_pointwise<V, Cell<static_cast<CellKind>(kKinds)>, Storage>), ...);
  ((table.backward[kKinds][at] = backward_pointwise<V, Cell<static_cast<CellKind>(kKinds)>, Storage>), ...);
}

template <class V, class Storage>
void fill_storage(Kernels<typename V::Scalar>& table, int at) {
  fill_cells<V, Storage>(table, at, std::make_integer_sequence<int, kCellCount>{});
  table.direct[at] = direct_product<V, Storage>;
  table.store[at] = store_rows<V, Storage>;
  table.load[at] = load_array<V, Storage>;
  table.save[at] = save_array<V, Storage>;
}

}  // namespace fused_rnn::cpu
