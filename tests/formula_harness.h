// Runs generated cells, and those of cells.h, on arrays of units: forward, then backward on nothing but what it may read.
// All else holds NaN meanwhile, so that a value that backward should not have shows in its results.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/formula_math.h"

namespace fused_rnn {

// Of n units, one unit after the other; see Plan in fused_rnn/formula/plan.py for the orders.
struct Units {
  int n;
  const double *accumulators, *before, *parameters, *d_after;  // [n, slots], [n, states], [n, parameters], [n, states]
  double *after, *saved, *d, *d_before, *d_parameters;         // [n, states], [n, saved], [n, slots], [n, states], ...
};

template <class C, class = void>
struct IsOfCellsH : std::false_type {};
template <class C>
struct IsOfCellsH<C, std::void_t<decltype(C::kHasC)>> : std::true_type {};

template <class V>
V nan() {
  return std::numeric_limits<V>::quiet_NaN();
}
template <class V, int kCount>
void load(const double* from, V (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<V>(from[i]);
}
template <class V, int kCount>
void store(const V (&from)[kCount], double* to) {
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<double>(from[i]);
}
// The first kSaved of a stay.
template <class V, int kCount>
void store_saved(V (&a)[kCount], int saved, double* to) {
  for (int i = 0; i < kCount; ++i) {
    if (i < saved) {
      to[i] = static_cast<double>(a[i]);
    } else {
      a[i] = nan<V>();
    }
  }
}

template <class C, class V>
void run_by_hand(const Units& u) {
  constexpr int kStates = C::kHasC ? 2 : 1;
  for (int i = 0; i < u.n; ++i) {
    V a[C::kSlots], before[2] = {nan<V>(), nan<V>()}, after[2] = {nan<V>(), nan<V>()}, d[C::kSlots], gradient[kStates];
    V states[kStates];
    load(u.accumulators + i * C::kSlots, a);
    load(u.before + i * kStates, states);
    load(u.d_after + i * kStates, gradient);
    if (C::kReadsH) before[0] = states[0];
    if (C::kHasC) before[1] = states[kStates - 1];
    C::forward(a, before[0], before[1], after[0], after[1]);
    for (int s = 0; s < kStates; ++s) u.after[i * kStates + s] = static_cast<double>(after[s]);
    store_saved(a, C::kSaved, u.saved + i * C::kSaved);
    V dc = C::kHasC ? gradient[kStates - 1] : nan<V>();
    const V dh_prev =
        C::backward(a, before[0], before[1], after[1], C::kSaved > 0 ? nan<V>() : after[0], gradient[0], dc, d);
    store(d, u.d + i * C::kSlots);
    u.d_before[i * kStates] = static_cast<double>(dh_prev);
    if (C::kHasC) u.d_before[i * kStates + 1] = static_cast<double>(dc);
  }
}

template <class C, class V>
void run_general(const Units& u) {
  constexpr int kParameters = C::kParameters > 0 ? C::kParameters : 1;
  for (int i = 0; i < u.n; ++i) {
    V a[C::kValues], before[C::kStates], after[C::kStates], p[kParameters], d[C::kSlots], d_states[C::kStates];
    V d_parameters[kParameters] = {};
    for (V& value : a) value = nan<V>();
    for (int s = 0; s < C::kSlots; ++s) a[s] = static_cast<V>(u.accumulators[i * C::kSlots + s]);
    load(u.before + i * C::kStates, before);
    load(u.d_after + i * C::kStates, d_states);
    if (C::kParameters > 0) load(u.parameters + i * C::kParameters, p);
    for (int s = 0; s < C::kStates; ++s) {
      if (!C::forward_reads(s)) before[s] = nan<V>();
    }
    if constexpr (C::kParameters > 0) {
      C::forward(a, before, after, p);
    } else {
      C::forward(a, before, after);
    }
    store(after, u.after + i * C::kStates);
    store_saved(a, C::kSaved, u.saved + i * C::kSaved);
    for (int s = 0; s < C::kStates; ++s) {
      if (!C::reads_state(s)) before[s] = after[s] = nan<V>();
    }
    if constexpr (C::kParameters > 0) {
      C::backward(a, before, after, p, d_states, d, d_parameters);
      store(d_parameters, u.d_parameters + i * C::kParameters);
    } else {
      C::backward(a, before, after, d_states, d);
    }
    store(d, u.d + i * C::kSlots);
    store(d_states, u.d_before + i * C::kStates);
  }
}

template <class C>
void run(const Units& units, bool wide) {
  if constexpr (IsOfCellsH<C>::value) {
    wide ? run_by_hand<C, double>(units) : run_by_hand<C, float>(units);
  } else {
    wide ? run_general<C, double>(units) : run_general<C, float>(units);
  }
}

}  // namespace fused_rnn
