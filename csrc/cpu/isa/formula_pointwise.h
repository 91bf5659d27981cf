// The pointwise half of a formula's step on vectors of units: load, call the cell's struct, store. Rows: formula.h.
#pragma once
#include "core/formula_math.h"
#include "cpu/isa/formula.h"
#include "cpu/isa/formula_simd.h"
#include "cpu/isa/pointwise.h"

namespace fused_rnn::cpu {

// A vector of units of a head.
struct FormulaItem {
  int head;
  int64_t unit;         // of the head
  int64_t global_unit;  // of the layer
  int lanes;
  bool last;  // of the layer: behind it arrays of A have room for a whole vector
};

// f(item) for items [first, last).
template <int kWidth, class F>
inline void for_formula_items(int64_t first, int64_t last, int64_t H, int heads, F&& f) {
  const int64_t units = H / heads, of_head = (units + kWidth - 1) / kWidth;
  FormulaItem item{static_cast<int>(first / of_head), first % of_head * kWidth, 0, 0, false};
  for (int64_t i = first; i < last; ++i) {
    item.global_unit = item.head * units + item.unit;
    item.lanes = static_cast<int>(units - item.unit < kWidth ? units - item.unit : kWidth);
    item.last = item.global_unit + item.lanes == H;
    f(item);
    item.unit += kWidth;
    if (item.unit >= units) item.unit = 0, ++item.head;
  }
}

// Stores to an array of A without touching the units of the next head.
template <class V>
inline void store_units(const V& value, typename V::Scalar* to, const FormulaItem& item) {
  if (item.lanes == V::kWidth || item.last) {
    value.store(to);
  } else {
    value.store_partial(to, item.lanes);
  }
}

// The value as `Storage` has it.
template <class V, class Storage>
inline V rounded(const V& value) {
  if constexpr (std::is_same_v<Storage, typename V::Scalar>) {
    return value;
  } else {
    Storage lanes[V::kWidth];
    value.store(lanes);
    return V::load(lanes);
  }
}

template <class V, class C, class Storage>
struct FormulaStep {
  using A = typename V::Scalar;
  static constexpr int kParameters = C::kParameters > 0 ? C::kParameters : 1;
  static constexpr int kValues = C::kValues > 0 ? C::kValues : 1;

  // Whether the accumulator of a recurrent product has an input product in it.
  static constexpr bool adds(int recurrent_gate) {
    for (int g = 0; g < C::kInputGates; ++g) {
      if (C::input_slot(g) == C::recurrent_slot(recurrent_gate)) return true;
    }
    return false;
  }

  template <class Row>
  static void load_parameters(const FormulaCall<Row>& call, const FormulaItem& item, V (&p)[kParameters]) {
    const A* const from = static_cast<const A*>(call.parameters) + item.global_unit;
    for (int i = 0; i < C::kParameters; ++i) p[i] = V::load(from + i * call.parameter_stride);
  }

  static void forward_item(const FormulaCall<FormulaForwardRow<A>>& call, const FormulaForwardRow<A>& row,
                           const FormulaItem& item) {
    const int64_t units = call.H / call.heads, unit = item.global_unit;
    V a[kValues], before[C::kStates], after[C::kStates], p[kParameters];
    for (int g = 0; g < C::kInputGates; ++g) a[C::input_slot(g)] = V::load(row.x + g * call.H + unit);
    for (int g = 0; g < C::kRecurrentGates; ++g) {
      const V sum = V::load(row.rec + item.head * call.rec_columns + g * units + item.unit);
      const int slot = C::recurrent_slot(g);
      a[slot] = adds(g) ? a[slot] + sum : sum;
    }
    for (int s = 0; s < C::kStates; ++s) {
      if (C::forward_reads(s)) before[s] = V::load(row.before[s] + unit);
    }
    load_parameters(call, item, p);
    if constexpr (C::kParameters > 0) {
      C::forward(a, before, after, p);
    } else {
      C::forward(a, before, after);
    }
    for (int s = 0; s < C::kStates; ++s) {
      if (s == C::kOutput || s == C::kRecurrent) after[s] = rounded<V, Storage>(after[s]);
      store_units(after[s], row.after[s] + unit, item);
      if (row.series[s]) store_stored<V, Storage>(after[s], row.series[s], unit, item.lanes);
    }
    if (!row.saved) return;
    for (int k = 0; k < C::kSaved; ++k) store_stored<V, Storage>(a[k], row.saved, k * call.H + unit, item.lanes);
  }

  static void backward_item(const FormulaCall<FormulaBackwardRow<A>>& call, const FormulaBackwardRow<A>& row,
                            const FormulaItem& item) {
    constexpr int kFirst = C::kSlots - C::kRecurrentGates;
    const int64_t units = call.H / call.heads, unit = item.global_unit;
    V a[kValues], before[C::kStates], after[C::kStates], p[kParameters];
    V d_states[C::kStates], d[C::kSlots], d_parameters[kParameters];
    for (int k = 0; k < C::kSaved; ++k) a[k] = load_stored<V, Storage>(row.saved, k * call.H + unit, item.lanes);
    for (int s = 0; s < C::kStates; ++s) {
      if (C::reads_state(s)) {
        before[s] = load_stored<V, Storage>(row.before[s], unit, item.lanes);
        after[s] = load_stored<V, Storage>(row.after[s], unit, item.lanes);
      }
      d_states[s] = V::load(row.d_states[s] + unit);
    }
    d_states[C::kOutput] = d_states[C::kOutput] + load_stored<V, Storage>(row.dy, unit, item.lanes);
    if constexpr (C::kRecurrentGates > 0) {
      d_states[C::kRecurrent] = d_states[C::kRecurrent] + V::load(row.rec + item.head * call.rec_columns + item.unit);
    }
    load_parameters(call, item, p);
    if constexpr (C::kParameters > 0) {
      C::backward(a, before, after, p, d_states, d, d_parameters);
    } else {
      C::backward(a, before, after, d_states, d);
    }
    for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(d[s], row.d, s * call.H + unit, item.lanes);
    for (int i = 0; i < C::kParameters; ++i) {
      store_stored<V, Storage>(d_parameters[i], row.d, (C::kSlots + i) * call.H + unit, item.lanes);
    }
    if (row.d_rec) {
      A* const to = row.d_rec + item.head * C::kRecurrentGates * units + item.unit;
      for (int g = 0; g < C::kRecurrentGates; ++g) store_stored<V, A>(d[kFirst + g], to, g * units, item.lanes);
    }
    for (int s = 0; s < C::kStates; ++s) store_units(row.reset ? V(0) : d_states[s], row.d_states[s] + unit, item);
  }

  [[gnu::flatten]] static void forward(const FormulaCall<FormulaForwardRow<A>>& call) {
    for (int64_t r = 0; r < call.n_rows; ++r) {
      for_formula_items<V::kWidth>(call.first, call.last, call.H, call.heads,
                                   [&](const FormulaItem& item) { forward_item(call, call.rows[r], item); });
    }
  }
  [[gnu::flatten]] static void backward(const FormulaCall<FormulaBackwardRow<A>>& call) {
    for (int64_t r = 0; r < call.n_rows; ++r) {
      for_formula_items<V::kWidth>(call.first, call.last, call.H, call.heads,
                                   [&](const FormulaItem& item) { backward_item(call, call.rows[r], item); });
    }
  }
};

template <class V, class C, class Storage>
FormulaLibrary make_formula_library(DType dtype) {
  FormulaLibrary library{};
  library.version = kFormulaVersion;
  library.width = V::kWidth;
  library.dtype = static_cast<int>(dtype);
  static int input_gradients[C::kInputGates];
  static bool reads_series[C::kStates];
  for (int g = 0; g < C::kInputGates; ++g) input_gradients[g] = C::input_gradient(g);
  for (int s = 0; s < C::kStates; ++s) reads_series[s] = C::reads_state(s);
  library.traits = {C::kStates, C::kOutput, C::kRecurrent,  C::kInputGates,  C::kRecurrentGates,
                    C::kSlots,  C::kSaved,  C::kParameters, input_gradients, reads_series};
  using Step = FormulaStep<V, C, Storage>;
  if constexpr (sizeof(typename V::Scalar) == 8) {
    library.f64 = {Step::forward, Step::backward};
  } else {
    library.f32 = {Step::forward, Step::backward};
  }
  return library;
}

}  // namespace fused_rnn::cpu
