// sigmoid, tanh and relu of SIMD vectors, found by argument-dependent lookup through the base class VectorBase.
//
// With y = n ln 2 + r, |r| <= ln 2 / 2:  expm1(y) = 2^n expm1(r) + (2^n - 1), expm1(r) = r + r^2 q(r), where q is a
// polynomial that was fitted on Chebyshev nodes. tanh(x) = e / (e + 2) with e = expm1(2x), which is accurate near 0 too.
// Errors are below 2 ulp (tests/test_cpu.py). Infinities saturate, NaN stays NaN.
#pragma once
#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu::simd {

struct VectorBase {};

// kCount vectors; every operation is done on all of them. kShort: sigmoid and tanh are the vector's short ones.
template <class V, int kCount, bool kShort = false>
struct Several : VectorBase {
  using Scalar = typename V::Scalar;
  V v[kCount];
  Several() {}
  explicit Several(Scalar value) {
    for (V& element : v) element = V(value);
  }
  template <class F>
  static Several of(F&& f) {
    Several result;
    for (int i = 0; i < kCount; ++i) result.v[i] = f(i);
    return result;
  }
  friend Several operator+(const Several& a, const Several& b) {
    return of([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Several operator-(const Several& a, const Several& b) {
    return of([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Several operator*(const Several& a, const Several& b) {
    return of([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Several multiply_add(const Several& a, const Several& b, const Several& c) {
    return of([&](int i) { return multiply_add(a.v[i], b.v[i], c.v[i]); });
  }
  friend Several clamp(const Several& x, const Several& low, const Several& high) {
    return of([&](int i) { return clamp(x.v[i], low.v[i], high.v[i]); });
  }
  friend Several round_to_integer(const Several& x) {
    return of([&](int i) { return round_to_integer(x.v[i]); });
  }
  friend Several power_of_two(const Several& n) {
    return of([&](int i) { return power_of_two(n.v[i]); });
  }
  friend Several select_less(const Several& a, const Several& b, const Several& x, const Several& y) {
    return of([&](int i) { return select_less(a.v[i], b.v[i], x.v[i], y.v[i]); });
  }
  friend Several reciprocal(const Several& x) {
    return of([&](int i) { return reciprocal(x.v[i]); });
  }
  friend Several divide(const Several& n, const Several& d) {
    return of([&](int i) { return divide(n.v[i], d.v[i]); });
  }
};

template <class A>
struct Polynomial;
template <>
struct Polynomial<float> {
  static constexpr int kTerms = 5;
  static constexpr float kQ[kTerms] = {0.5f, 0.166665767f, 0.0416665542f, 0.00836323288f, 0.00139262508f};
  static constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  static constexpr float kExpLimit = 87.0f, kTanhLimit = 20.0f;
};
template <>
struct Polynomial<double> {
  static constexpr int kTerms = 11;
  static constexpr double kQ[kTerms] = {0.5,
                                        0.16666666666666671,
                                        0.0416666666666666698,
                                        0.00833333333332608312,
                                        0.00138888888888837112,
                                        0.000198412698750022788,
                                        0.0000248015873256774619,
                                        2.75572551700008874e-6,
                                        2.75572734787185805e-7,
                                        2.51053127296221018e-8,
                                        2.09147553258932022e-9};
  static constexpr double kLog2e = 1.44269504088896340736, kLn2High = 6.93147180369123816490e-01,
                          kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLimit = 708.0, kTanhLimit = 40.0;
};

// expm1 of y, limited to [-limit, limit]; NaN stays NaN.
template <class V>
inline V limited_expm1(V y, typename V::Scalar limit) {
  using P = Polynomial<typename V::Scalar>;
  y = clamp(y, V(-limit), V(limit));
  const V n = round_to_integer(y * V(P::kLog2e));
  const V r = multiply_add(n, V(-P::kLn2Low), multiply_add(n, V(-P::kLn2High), y));
  V q = V(P::kQ[P::kTerms - 1]);
  for (int i = P::kTerms - 2; i >= 0; --i) q = multiply_add(q, r, V(P::kQ[i]));
  const V power = power_of_two(n);
  return multiply_add(power, multiply_add(r * r, q, r), power - V(1));
}

// 1 / (1 + exp(-x)), with r = x - n ln 2 for exp(-x) = 2^-n exp(-r).
template <class V>
inline V sigmoid(V x) {
  using P = Polynomial<typename V::Scalar>;
  x = clamp(x, V(-P::kExpLimit), V(P::kExpLimit));
  const V n = round_to_integer(x * V(-P::kLog2e));
  const V r = multiply_add(n, V(P::kLn2Low), multiply_add(n, V(P::kLn2High), x));
  constexpr auto sign = [](int i) { return i % 2 == 0 ? 1 : -1; };
  V q = V(sign(P::kTerms + 1) * P::kQ[P::kTerms - 1]);
  for (int i = P::kTerms - 2; i >= 0; --i) q = multiply_add(q, r, V(sign(i) * P::kQ[i]));
  q = multiply_add(multiply_add(q, r, V(-1)), r, V(1));
  return reciprocal(multiply_add(power_of_two(n), q, V(1)));
}
template <class V>
inline V tanh(V x) {
  const V e = limited_expm1(x + x, Polynomial<typename V::Scalar>::kTanhLimit);
  return divide(e, e + V(2));
}
// For values that are stored in bfloat16, by vectors that have them: relative errors below 2^-13, a sixteenth of what
// bfloat16 rounds off.
template <class V, int kCount>
inline Several<V, kCount, true> sigmoid(const Several<V, kCount, true>& x) {
  return Several<V, kCount, true>::of([&](int i) { return short_sigmoid(x.v[i]); });
}
template <class V, int kCount>
inline Several<V, kCount, true> tanh(const Several<V, kCount, true>& x) {
  return Several<V, kCount, true>::of([&](int i) { return short_tanh(x.v[i]); });
}
template <class V>
inline V relu(V x) {
  return select_less(x, V(0), V(0), x);
}
template <class V>
inline V relu_mask(V y, V d) {
  return select_less(V(0), y, d, V(0));
}

}  // namespace fused_rnn::cpu::simd
