// The arithmetic of a plan's kernel as a template argument.
#pragma once
#include <stdexcept>
#include <string>

#include "plan/plan.h"

namespace fused_rnn::cuda {

// Calls f with the arithmetic of a family of one launch a layer as a compile-time constant. These have no fp64 kernels.
template <class F>
auto dispatch_sequence_math(const Plan& plan, F&& f) {
  using Result = decltype(f(std::integral_constant<MathKind, MathKind::kFp32>{}));
  return dispatch_math(plan.persistent->math, [&](auto tag) -> Result {
    if constexpr (decltype(tag)::value == MathKind::kFp64) {
      throw std::invalid_argument(std::string("family ") + to_string(plan.family) + " has no fp64 kernels");
    } else {
      return f(tag);
    }
  });
}

}  // namespace fused_rnn::cuda
