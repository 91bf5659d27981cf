// Dual numbers: a value and its tangent. The formulas of cells.h on them are the formulas' derivatives, so that the second
// derivatives of a cell need no formula of their own. V: as in cells.h.
#pragma once
#include "core/cells.h"

namespace fused_rnn {

template <class V>
struct Dual {
  V value, tangent;

  FUSED_RNN_HD Dual() {}
  FUSED_RNN_HD explicit Dual(int constant) : value(constant), tangent(0) {}
  FUSED_RNN_HD Dual(const V& value_, const V& tangent_) : value(value_), tangent(tangent_) {}
};

// No friends: GCC would compile those of a template without the instruction set of the file that includes this.
template <class V>
FUSED_RNN_HD Dual<V> operator+(const Dual<V>& a, const Dual<V>& b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class V>
FUSED_RNN_HD Dual<V> operator-(const Dual<V>& a, const Dual<V>& b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class V>
FUSED_RNN_HD Dual<V> operator*(const Dual<V>& a, const Dual<V>& b) {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}

template <class V>
FUSED_RNN_HD Dual<V> tanh(const Dual<V>& x) {
  using namespace math;
  const V y = tanh(x.value);
  return {y, (V(1) - y * y) * x.tangent};
}
// The gradient of relu is constant where it is not 0, so that the tangent of y has no part in it.
template <class V>
FUSED_RNN_HD Dual<V> relu_mask(const Dual<V>& y, const Dual<V>& d) {
  using namespace math;
  return {relu_mask(y.value, d.value), relu_mask(y.value, d.tangent)};
}

// y: the result of sigmoid, tanh or relu with the tangent of its argument in, with its own tangent out.
template <class V>
FUSED_RNN_HD void tangent_of_sigmoid(Dual<V>& y) {
  y.tangent = y.value * (V(1) - y.value) * y.tangent;
}
template <class V>
FUSED_RNN_HD void tangent_of_tanh(Dual<V>& y) {
  y.tangent = (V(1) - y.value * y.value) * y.tangent;
}
template <class V>
FUSED_RNN_HD void tangent_of_relu(Dual<V>& y) {
  using namespace math;
  y.tangent = relu_mask(y.value, y.tangent);
}

}  // namespace fused_rnn
