// What formulas need of SIMD vectors beside simd_math.h: comparisons, and the functions of core/formula_math.h. Written on
// the compiler's own vectors, which the vectors of every instruction set are, and found by argument-dependent lookup.
//
// Errors of exp, expm1, log, log1p are a few units in the last place (tests/test_formula_kernels.py); erf, sin and cos are
// the math library's, lane by lane. NaN stays NaN, infinities and zeros are what torch makes of them.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/isa/simd_math.h"

namespace fused_rnn::cpu::simd {

template <class V>
struct Lanes {
  using Integer = std::conditional_t<sizeof(typename V::Scalar) == 8, int64_t, int32_t>;
  typedef typename V::Scalar Numbers __attribute__((vector_size(V::kWidth * sizeof(typename V::Scalar))));
  typedef Integer Bits __attribute__((vector_size(V::kWidth * sizeof(Integer))));
};
template <class V>
using Bits = typename Lanes<V>::Bits;

template <class V>
inline typename Lanes<V>::Numbers numbers(const V& x) {
  return (typename Lanes<V>::Numbers)x.v;
}
template <class V>
inline V vector_of_numbers(typename Lanes<V>::Numbers x) {
  V result;
  result.v = (decltype(result.v))x;
  return result;
}
template <class V>
inline Bits<V> bits_of(const V& x) {
  return (Bits<V>)x.v;
}
template <class V>
inline V vector_of_bits(Bits<V> x) {
  V result;
  result.v = (decltype(result.v))x;
  return result;
}

// All bits of a lane are set where it is true.
template <class V>
struct Mask {
  Bits<V> bits;
  friend Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend Mask operator!(Mask a) { return {~a.bits}; }
};

template <class V>
using IfVector = std::enable_if_t<std::is_base_of_v<VectorBase, V>>;

#define FUSED_RNN_COMPARE(op)                          \
  template <class V, class = IfVector<V>>              \
  inline Mask<V> operator op(const V& a, const V& b) { \
    return {(Bits<V>)(numbers(a) op numbers(b))};      \
  }
FUSED_RNN_COMPARE(<)
FUSED_RNN_COMPARE(<=)
FUSED_RNN_COMPARE(>)
FUSED_RNN_COMPARE(>=)
FUSED_RNN_COMPARE(==)
FUSED_RNN_COMPARE(!=)
#undef FUSED_RNN_COMPARE

template <class V>
inline V select(Mask<V> condition, V a, V b) {
  return vector_of_bits<V>((bits_of(a) & condition.bits) | (bits_of(b) & ~condition.bits));
}
template <class V, class = IfVector<V>>
inline V operator/(const V& a, const V& b) {
  return divide(a, b);
}
template <class V, class = IfVector<V>>
inline V operator-(const V& a) {
  return vector_of_numbers<V>(-numbers(a));
}
template <class V, class = IfVector<V>>
inline V minimum(V a, V b) {
  return select((a < b) | (a != a), a, b);
}
template <class V, class = IfVector<V>>
inline V maximum(V a, V b) {
  return select((a > b) | (a != a), a, b);
}
template <class V, class = IfVector<V>>
inline V abs(V x) {
  constexpr int kSignBit = sizeof(typename V::Scalar) * 8 - 1;
  return vector_of_bits<V>(bits_of(x) & ~((Bits<V>{} + 1) << kSignBit));
}

// A function of one number on each lane.
template <class V, class F>
inline V by_lane(V x, F&& f) {
  typename V::Scalar lanes[V::kWidth];
  x.store(lanes);
  for (auto& lane : lanes) lane = f(lane);
  return V::load(lanes);
}
template <class V, class = IfVector<V>>
inline V sqrt(V x) {
  return by_lane(x, [](auto lane) { return std::sqrt(lane); });
}
template <class V, class = IfVector<V>>
inline V erf(V x) {
  return by_lane(x, [](auto lane) { return std::erf(lane); });
}
template <class V, class = IfVector<V>>
inline V sin(V x) {
  return by_lane(x, [](auto lane) { return std::sin(lane); });
}
template <class V, class = IfVector<V>>
inline V cos(V x) {
  return by_lane(x, [](auto lane) { return std::cos(lane); });
}

// exp(x) = 2^n exp(r), 2^n as a product of two powers, so that results near the largest and below the smallest normal number
// are right.
template <class V, class = IfVector<V>>
inline V exp(V x) {
  using P = Polynomial<typename V::Scalar>;
  constexpr bool kDouble = sizeof(typename V::Scalar) == 8;
  const V limited = clamp(x, V(kDouble ? -746 : -104), V(kDouble ? 710 : 89));
  const V n = round_to_integer(limited * V(P::kLog2e));
  const V r = multiply_add(n, V(-P::kLn2Low), multiply_add(n, V(-P::kLn2High), limited));
  V q = V(P::kQ[P::kTerms - 1]);
  for (int i = P::kTerms - 2; i >= 0; --i) q = multiply_add(q, r, V(P::kQ[i]));
  const V e = multiply_add(r * r, q, r) + V(1);
  const V half = round_to_integer(n * V(0.5));
  const V result = e * power_of_two(half) * power_of_two(n - half);
  return select(x != x, x, result);
}
template <class V, class = IfVector<V>>
inline V expm1(V x) {
  using A = typename V::Scalar;
  return select(x > V(Polynomial<A>::kExpLimit), exp(x), limited_expm1(x, Polynomial<A>::kExpLimit));
}

// log(x) = n ln 2 + log(m), sqrt(1/2) <= m < sqrt(2); log(m) = 2 atanh(s), s = (m - 1) / (m + 1), by its series: s^2 is at
// most 0.0295. extra: added to the result before the largest term, for log1p.
template <class V>
inline V log_of_normal(V x, V extra) {
  using A = typename V::Scalar;
  using P = Polynomial<A>;
  constexpr bool kDouble = sizeof(A) == 8;
  constexpr int kFraction = kDouble ? 52 : 23, kTerms = kDouble ? 12 : 5;
  const Bits<V> sqrt_half = bits_of(V(A(0.70710678118654752440)));
  const Bits<V> offset = bits_of(x) - sqrt_half;
  const Bits<V> n_bits = offset >> kFraction;  // arithmetic: rounds down
  const V n = vector_of_numbers<V>(__builtin_convertvector(n_bits, typename Lanes<V>::Numbers));
  const V m = vector_of_bits<V>(bits_of(x) - (n_bits << kFraction));
  const V f = m - V(1), s = divide(f, m + V(1)), z = s * s;
  V series = V(A(1) / A(2 * kTerms + 1));
  for (int i = kTerms - 1; i >= 1; --i) series = multiply_add(series, z, V(A(1) / A(2 * i + 1)));
  // 2 s = f - s f, so that 2 atanh(s) = f + s (2 z series - f), whose largest term is exact.
  const V low = multiply_add(n, V(P::kLn2Low), extra) + s * (V(2) * z * series - f);
  return multiply_add(n, V(P::kLn2High), f + low);
}
template <class V>
inline V log_with(V x, V extra) {
  using A = typename V::Scalar;
  constexpr bool kDouble = sizeof(A) == 8;
  const A least = kDouble ? A(2.2250738585072014e-308) : A(1.17549435e-38f), up = kDouble ? A(0x1p54) : A(0x1p25f);
  const Mask<V> small = x < V(least);
  const V of_small = V(kDouble ? -54 : -25) * (V(Polynomial<A>::kLn2High) + V(Polynomial<A>::kLn2Low));
  V result = log_of_normal(select(small, x * V(up), x), extra);
  result = select(small, result + of_small, result);
  result = select(x == V(0), V(-A(INFINITY)), result);
  return select((x < V(0)) | (x != x), V(A(NAN)), select(x == V(A(INFINITY)), x, result));
}
template <class V, class = IfVector<V>>
inline V log(V x) {
  return log_with(x, V(0));
}
// With u = 1 + x rounded: log(1 + x) = log(u) + (x - (u - 1)) / u.
template <class V, class = IfVector<V>>
inline V log1p(V x) {
  const V u = V(1) + x;
  const V rest = select(abs(x) < V(1), x - (u - V(1)), V(1) - (u - x));
  const V extra = select((u > V(0)) & (u < V(typename V::Scalar(INFINITY))), divide(rest, u), V(0));
  return select(x == V(0), x, log_with(u, extra));  // keeps the sign of zero
}

}  // namespace fused_rnn::cpu::simd
