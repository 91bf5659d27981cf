// Calls of a generated cell C (fused_rnn/formula/writer.py). Its functions take the cell's own vectors and numbers only
// where it has some, and what concerns its phases likewise.
//
// Members of `in`, forward: a values, before states, p the cell's own vectors and numbers, ph results of phases.
// Backward: a, before, after (states), p, v what phases took, d_states gradients of the states after the step, dv gradients
// of what phases took.
#pragma once
#include "core/host_device.h"

namespace fused_rnn {

// The states after a step; leaves in in.a what is saved.
template <class C, class In, class States>
FUSED_RNN_HD void call_forward(In& in, States& after) {
  if constexpr (C::kParameters > 0 && C::kPhases > 0) {
    C::forward(in.a, in.before, after, in.p, in.ph);
  } else if constexpr (C::kPhases > 0) {
    C::forward(in.a, in.before, after, in.ph);
  } else if constexpr (C::kParameters > 0) {
    C::forward(in.a, in.before, after, in.p);
  } else {
    C::forward(in.a, in.before, after);
  }
}

// The gradients of products and parameters; leaves in in.d_states those of the states before the step.
template <class C, class In, class Slots, class Parameters>
FUSED_RNN_HD void call_backward(In& in, Slots& d, Parameters& d_parameters) {
  if constexpr (C::kParameters > 0 && C::kPhases > 0) {
    C::backward(in.a, in.before, in.after, in.p, in.v, in.d_states, in.dv, d, d_parameters);
  } else if constexpr (C::kPhases > 0) {
    C::backward(in.a, in.before, in.after, in.v, in.d_states, in.dv, d);
  } else if constexpr (C::kParameters > 0) {
    C::backward(in.a, in.before, in.after, in.p, in.d_states, d, d_parameters);
  } else {
    C::backward(in.a, in.before, in.after, in.d_states, d);
  }
}

// What phase kPhase takes.
template <class C, int kPhase, class In, class V>
FUSED_RNN_HD void call_phase_input(const In& in, V& v) {
  if constexpr (C::kParameters > 0) {
    C::template phase_input<kPhase>(in.a, in.before, in.p, in.ph, v);
  } else {
    C::template phase_input<kPhase>(in.a, in.before, in.ph, v);
  }
}

// The gradient of the result of phase kPhase.
template <class C, int kPhase, class In, class V>
FUSED_RNN_HD void call_phase_gradient(const In& in, V& d) {
  if constexpr (C::kParameters > 0) {
    C::template phase_gradient<kPhase>(in.a, in.before, in.after, in.p, in.v, in.d_states, in.dv, d);
  } else {
    C::template phase_gradient<kPhase>(in.a, in.before, in.after, in.v, in.d_states, in.dv, d);
  }
}

}  // namespace fused_rnn
