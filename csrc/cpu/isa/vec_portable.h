// Vectors of 16 bytes in the vector extension of GCC and Clang, which every target of theirs has, in vector registers or
// without.
#pragma once
#include <cstring>

#include "cpu/isa/simd_math.h"

namespace fused_rnn::cpu::portable {

template <class A>
struct Native;
template <>
struct Native<float> {
  typedef float Vector __attribute__((vector_size(16)));
  typedef int32_t Bits __attribute__((vector_size(16)));
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  static constexpr int kBias = 127, kFraction = 23;
};
template <>
struct Native<double> {
  typedef double Vector __attribute__((vector_size(16)));
  typedef int64_t Bits __attribute__((vector_size(16)));
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kBias = 1023, kFraction = 52;
};

template <class A>
struct Vec : simd::VectorBase {
  using Scalar = A;
  using N = Native<A>;
  using Vector = typename N::Vector;
  using Bits = typename N::Bits;
  static constexpr int kWidth = 16 / sizeof(A);
  static constexpr int kMostSums = 12;  // of x86; other processors have more registers
  static constexpr bool kHalves = true;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 6, 4, 3};
  static constexpr int kMaxPanels[3] = {0, 2, 1};
  static constexpr int kDirectRows = 2;
  static constexpr int kInStep = 1;
  using Square = void;
  static constexpr bool kShort = false;
  Vector v;
  Vec() {}
  Vec(Vector value) : v(value) {}
  explicit Vec(A value) : v(value - Vector{}) {}
  static Vec broadcast(const A* p) { return Vec(*p); }
  static Vec load(const A* p) {
    Vec value;
    std::memcpy(&value.v, p, sizeof(Vector));
    return value;
  }
  static Vec load_pinned(const A* p) { return load(p); }
  void store(A* p) const { std::memcpy(p, &v, sizeof(Vector)); }
  template <class Storage>
  static Vec load(const Storage* p) {
    return load_partial(p, kWidth);
  }
  template <class Storage>
  void store(Storage* p) const {
    store_partial(p, kWidth);
  }
  template <class Storage>
  static Vec load_partial(const Storage* p, int n) {
    A lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = to_arithmetic(p[i]);
    return load(lanes);
  }
  template <class Storage>
  void store_partial(Storage* p, int n) const {
    A lanes[kWidth];
    store(lanes);
    for (int i = 0; i < n; ++i) store_converted(lanes[i], p + i);
  }

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec multiply_add(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
  friend Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    const Bits less = a.v < b.v;
    return reinterpret_cast<Vector>((less & reinterpret_cast<Bits>(x.v)) | (~less & reinterpret_cast<Bits>(y.v)));
  }
  friend Vec clamp(Vec x, Vec low, Vec high) { return select_less(high, x, high, select_less(x, low, low, x)); }
  friend Vec round_to_integer(Vec x) { return x + Vec(N::kMagic) - Vec(N::kMagic); }
  friend Vec power_of_two(Vec n) {
    const Bits integer = reinterpret_cast<Bits>((n + Vec(N::kMagic)).v) - reinterpret_cast<Bits>(Vec(N::kMagic).v);
    return reinterpret_cast<Vector>((integer + N::kBias) << N::kFraction);
  }
  friend Vec reciprocal(Vec x) { return Vec(A(1)).v / x.v; }
  friend Vec divide(Vec n, Vec d) { return n.v / d.v; }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

}  // namespace fused_rnn::cpu::portable
