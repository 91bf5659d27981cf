// The pointwise half of a formula's step on vectors of units: load, call the cell's struct, store. Rows: formula.h.
#pragma once
#include <type_traits>
#include <utility>

#include "core/formula_call.h"
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
  static constexpr int kPhases = C::kPhases > 0 ? C::kPhases : 1;

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

  struct Forward {
    V a[kValues], before[C::kStates], p[kParameters], ph[kPhases];
  };
  // What a pointwise part of forward reads: results of phases below `level`, and all else.
  static Forward load_forward(const FormulaCall<FormulaForwardRow<A>>& call, const FormulaForwardRow<A>& row,
                              const FormulaItem& item, int level) {
    const int64_t units = call.H / call.heads, unit = item.global_unit;
    Forward in;
    for (int g = 0; g < C::kInputGates; ++g) in.a[C::input_slot(g)] = V::load(row.x + g * call.H + unit);
    for (int g = 0; g < C::kRecurrentGates; ++g) {
      const V sum = V::load(row.rec + item.head * call.rec_columns + g * units + item.unit);
      const int slot = C::recurrent_slot(g);
      in.a[slot] = adds(g) ? in.a[slot] + sum : sum;
    }
    for (int s = 0; s < C::kStates; ++s) {
      if (C::forward_reads(s)) in.before[s] = V::load(row.before[s] + unit);
    }
    for (int k = 0; k < C::kPhases; ++k) {
      if (C::forward_level(k) < level) in.ph[k] = V::load(row.ph[k] + unit);
    }
    load_parameters(call, item, in.p);
    return in;
  }

  // f(std::integral_constant<int, k>{}) for all phases k.
  template <class F, int... kAll>
  static void for_phases(F&& f, std::integer_sequence<int, kAll...>) {
    (f(std::integral_constant<int, kAll>{}), ...);
  }
  template <class F>
  static void for_phases(F&& f) {
    for_phases(f, std::make_integer_sequence<int, C::kPhases>{});
  }

  template <int kPhase>
  static void give_input(const Forward& in, const FormulaForwardRow<A>& row, const FormulaItem& item) {
    V v;
    call_phase_input<C, kPhase>(in, v);
    store_units(v, row.v[kPhase] + item.global_unit, item);
    if (row.v_series[kPhase]) store_stored<V, Storage>(v, row.v_series[kPhase], item.global_unit, item.lanes);
  }
  template <int kLevel>
  static void phase_input_item(const FormulaCall<FormulaForwardRow<A>>& call, const FormulaForwardRow<A>& row,
                               const FormulaItem& item) {
    const Forward in = load_forward(call, row, item, kLevel);
    for_phases([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::forward_level(kPhase) == kLevel) give_input<kPhase>(in, row, item);
    });
  }

  static void forward_item(const FormulaCall<FormulaForwardRow<A>>& call, const FormulaForwardRow<A>& row,
                           const FormulaItem& item) {
    const int64_t unit = item.global_unit;
    Forward in = load_forward(call, row, item, C::kForwardLevels);
    V after[C::kStates];
    call_forward<C>(in, after);
    for (int s = 0; s < C::kStates; ++s) {
      if (s == C::kOutput || s == C::kRecurrent) after[s] = rounded<V, Storage>(after[s]);
      store_units(after[s], row.after[s] + unit, item);
      if (row.series[s]) store_stored<V, Storage>(after[s], row.series[s], unit, item.lanes);
    }
    if (!row.saved) return;
    for (int k = 0; k < C::kSaved; ++k) store_stored<V, Storage>(in.a[k], row.saved, k * call.H + unit, item.lanes);
  }

  struct Backward {
    V a[kValues], before[C::kStates], after[C::kStates], p[kParameters], v[kPhases], d_states[C::kStates], dv[kPhases];
  };
  // What a pointwise part of backward reads: dv of phases below `level`, and all else.
  static Backward load_backward(const FormulaCall<FormulaBackwardRow<A>>& call, const FormulaBackwardRow<A>& row,
                                const FormulaItem& item, int level) {
    const int64_t unit = item.global_unit;
    Backward in;
    for (int k = 0; k < C::kSaved; ++k) in.a[k] = load_stored<V, Storage>(row.saved, k * call.H + unit, item.lanes);
    for (int s = 0; s < C::kStates; ++s) {
      if (C::reads_state(s)) {
        in.before[s] = load_stored<V, Storage>(row.before[s], unit, item.lanes);
        in.after[s] = load_stored<V, Storage>(row.after[s], unit, item.lanes);
      }
      in.d_states[s] = V::load(row.d_states[s] + unit);
    }
    in.d_states[C::kOutput] = in.d_states[C::kOutput] + load_stored<V, Storage>(row.dy, unit, item.lanes);
    if constexpr (C::kRecurrentGates > 0) {
      in.d_states[C::kRecurrent] = in.d_states[C::kRecurrent] + V::load(row.rec + item.head * call.rec_columns + item.unit);
    }
    for (int k = 0; k < C::kPhases; ++k) in.v[k] = load_stored<V, Storage>(row.v[k], unit, item.lanes);
    for (int k = 0; k < C::kPhases; ++k) {
      if (C::backward_level(k) < level) in.dv[k] = V::load(row.dv[k] + unit);
    }
    load_parameters(call, item, in.p);
    return in;
  }

  template <int kPhase>
  static void give_gradient(const Backward& in, const FormulaCall<FormulaBackwardRow<A>>& call,
                            const FormulaBackwardRow<A>& row, const FormulaItem& item) {
    V d;
    call_phase_gradient<C, kPhase>(in, d);
    store_units(d, row.d_ph[kPhase] + item.global_unit, item);
    const int64_t block = C::kSlots + C::kParameters + kPhase;
    store_stored<V, Storage>(d, row.d, block * call.H + item.global_unit, item.lanes);
  }
  template <int kLevel>
  static void phase_gradient_item(const FormulaCall<FormulaBackwardRow<A>>& call, const FormulaBackwardRow<A>& row,
                                  const FormulaItem& item) {
    const Backward in = load_backward(call, row, item, kLevel);
    for_phases([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::backward_level(kPhase) == kLevel) give_gradient<kPhase>(in, call, row, item);
    });
  }

  static void backward_item(const FormulaCall<FormulaBackwardRow<A>>& call, const FormulaBackwardRow<A>& row,
                            const FormulaItem& item) {
    constexpr int kFirst = C::kSlots - C::kRecurrentGates;
    const int64_t units = call.H / call.heads, unit = item.global_unit;
    Backward in = load_backward(call, row, item, C::kBackwardLevels);
    V d[C::kSlots], d_parameters[kParameters];
    call_backward<C>(in, d, d_parameters);
    for (int s = 0; row.d_added && s < C::kSlots; ++s) {
      d[s] = d[s] + load_stored<V, Storage>(row.d_added, s * call.H + unit, item.lanes);
    }
    for (int s = 0; s < C::kSlots; ++s) store_stored<V, Storage>(d[s], row.d, s * call.H + unit, item.lanes);
    for (int i = 0; i < C::kParameters; ++i) {
      store_stored<V, Storage>(d_parameters[i], row.d, (C::kSlots + i) * call.H + unit, item.lanes);
    }
    if (row.d_rec) {
      A* const to = row.d_rec + item.head * C::kRecurrentGates * units + item.unit;
      for (int g = 0; g < C::kRecurrentGates; ++g) store_stored<V, A>(d[kFirst + g], to, g * units, item.lanes);
    }
    for (int s = 0; s < C::kStates; ++s) store_units(row.reset ? V(0) : in.d_states[s], row.d_states[s] + unit, item);
  }

  // f(row, item) for all items of all rows.
  template <class Row, class F>
  static void for_all(const FormulaCall<Row>& call, F&& f) {
    for (int64_t r = 0; r < call.n_rows; ++r) {
      for_formula_items<V::kWidth>(call.first, call.last, call.H, call.heads,
                                   [&](const FormulaItem& item) { f(call.rows[r], item); });
    }
  }
  [[gnu::flatten]] static void forward(const FormulaCall<FormulaForwardRow<A>>& call) {
    for_all(call, [&](const auto& row, const FormulaItem& item) { forward_item(call, row, item); });
  }
  [[gnu::flatten]] static void backward(const FormulaCall<FormulaBackwardRow<A>>& call) {
    for_all(call, [&](const auto& row, const FormulaItem& item) { backward_item(call, row, item); });
  }
  template <int kPhase>
  [[gnu::flatten]] static void phase_input(const FormulaCall<FormulaForwardRow<A>>& call) {
    for_all(call, [&](const auto& row, const FormulaItem& item) { phase_input_item<kPhase>(call, row, item); });
  }
  template <int kPhase>
  [[gnu::flatten]] static void phase_gradient(const FormulaCall<FormulaBackwardRow<A>>& call) {
    for_all(call, [&](const auto& row, const FormulaItem& item) { phase_gradient_item<kPhase>(call, row, item); });
  }
};

// Norms over the units of a row (formula.h).
template <class V, class Storage>
struct FormulaNorms {
  using A = typename V::Scalar;

  static A sum_of_lanes(const V& v) {
    A lanes[V::kWidth], sum = 0;
    v.store(lanes);
    for (const A lane : lanes) sum += lane;
    return sum;
  }
  // The sum of f(unit, lanes) over the row; f gives 0 in lanes that are no units.
  template <class F>
  static A sum(int64_t H, F&& f) {
    V total = V(0);
    for (int64_t u = 0; u < H; u += V::kWidth) total = total + f(u, lanes_left<V>(H, u));
    return sum_of_lanes(total);
  }
  static V present(const V& v, int lanes) {
    if (lanes == V::kWidth) return v;
    A values[V::kWidth];
    v.store(values);
    return V::load_partial(values, lanes);
  }
  struct Moments {
    A mean, scale;  // 1 / sqrt(variance + eps)
  };
  template <class Load>
  static Moments moments(const FormulaNorm<A>& call, Load&& load) {
    const A count = static_cast<A>(call.H);
    const A mean = call.centred ? sum(call.H, load) / count : A(0);
    const A variance = sum(call.H,
                           [&](int64_t u, int lanes) {
                             const V off = present(load(u, lanes) - V(mean), lanes);
                             return off * off;
                           }) /
                       count;
    return {mean, A(1) / std::sqrt(variance + A(kFormulaNormEpsilon))};
  }

  [[gnu::flatten]] static void forward(const FormulaNorm<A>& call) {
    const auto load = [&](int64_t u, int lanes) { return load_stored<V, A>(call.v, u, lanes); };
    const Moments m = moments(call, load);
    for (int64_t u = 0; u < call.H; u += V::kWidth) {
      V out = (V::load(call.v + u) - V(m.mean)) * V(m.scale) * V::load(call.weight + u);
      if (call.bias) out = out + V::load(call.bias + u);
      out.store(call.out + u);
    }
  }
  [[gnu::flatten]] static void backward(const FormulaNorm<A>& call) {
    const auto load = [&](int64_t u, int lanes) { return load_stored<V, Storage>(call.v_stored, u, lanes); };
    const Moments m = moments(call, load);
    const auto normal = [&](int64_t u, int lanes) { return (load(u, lanes) - V(m.mean)) * V(m.scale); };
    const auto weighted = [&](int64_t u) { return V::load(call.d + u) * V::load(call.weight + u); };
    const A count = static_cast<A>(call.H);
    const A along =
        sum(call.H, [&](int64_t u, int lanes) { return present(weighted(u) * normal(u, lanes), lanes); }) / count;
    const A mean =
        call.centred ? sum(call.H, [&](int64_t u, int lanes) { return present(weighted(u), lanes); }) / count : A(0);
    for (int64_t u = 0; u < call.H; u += V::kWidth) {
      const V n = normal(u, lanes_left<V>(call.H, u));
      ((weighted(u) - V(mean) - n * V(along)) * V(m.scale)).store(call.out + u);
    }
  }
};

template <class Step, class A, int... kLevels>
void fill_phase_inputs(FormulaKernels<A>& kernels, std::integer_sequence<int, kLevels...>) {
  ((kernels.phase_input[kLevels] = Step::template phase_input<kLevels>), ...);
}
template <class Step, class A, int... kLevels>
void fill_phase_gradients(FormulaKernels<A>& kernels, std::integer_sequence<int, kLevels...>) {
  ((kernels.phase_gradient[kLevels] = Step::template phase_gradient<kLevels>), ...);
}

template <class V, class C, class Storage>
FormulaLibrary make_formula_library(DType dtype) {
  FormulaLibrary library{};
  library.version = kFormulaVersion;
  library.width = V::kWidth;
  library.dtype = static_cast<int>(dtype);
  static int input_gradients[C::kInputGates], phase_kinds[C::kPhases + 1];
  static int forward_levels[C::kPhases + 1], backward_levels[C::kPhases + 1];
  static bool reads_series[C::kStates];
  for (int g = 0; g < C::kInputGates; ++g) input_gradients[g] = C::input_gradient(g);
  for (int k = 0; k < C::kPhases; ++k) {
    phase_kinds[k] = C::phase_kind(k);
    forward_levels[k] = C::forward_level(k), backward_levels[k] = C::backward_level(k);
  }
  for (int s = 0; s < C::kStates; ++s) reads_series[s] = C::reads_state(s);
  library.traits = {C::kStates,   C::kOutput,  C::kRecurrent,  C::kInputGates, C::kRecurrentGates,
                    C::kSlots,    C::kSaved,   C::kParameters, C::kPhases,     input_gradients,
                    reads_series, phase_kinds, forward_levels, backward_levels};
  using A = typename V::Scalar;
  using Step = FormulaStep<V, C, Storage>;
  FormulaKernels<A> kernels{};
  kernels.forward = Step::forward;
  kernels.backward = Step::backward;
  fill_phase_inputs<Step>(kernels, std::make_integer_sequence<int, C::kForwardLevels>{});
  fill_phase_gradients<Step>(kernels, std::make_integer_sequence<int, C::kBackwardLevels>{});
  if constexpr (C::kPhases > 0) {
    kernels.norm = FormulaNorms<V, Storage>::forward;
    kernels.norm_gradient = FormulaNorms<V, Storage>::backward;
  }
  if constexpr (sizeof(A) == 8) {
    library.f64 = kernels;
  } else {
    library.f32 = kernels;
  }
  return library;
}

}  // namespace fused_rnn::cpu
