// Division that rounds up.
#pragma once
#include <type_traits>

#include "core/host_device.h"

namespace fused_rnn {

// How many parts of b elements hold a elements; a >= 0, b > 0.
template <class A, class B>
constexpr FUSED_RNN_HD std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace fused_rnn
