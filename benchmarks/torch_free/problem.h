// A layer's data on the host, and what its forward and backward must give: the cell's formulas in float64. Letters and
// layouts: core/params.h.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/cells.h"
#include "core/dispatch.h"
#include "core/params.h"

namespace torch_free {

using namespace fused_rnn;
using Doubles = std::vector<double>;

struct Case {
  CellKind cell;
  DType dtype;
  bool tf32;
  int T, B, I, H, D;
  bool lengths, resets, states, grad_h0;
};

inline std::string name_of(const Case& c) {
  const char* const dtypes[] = {"float64", "float32", "float16", "bfloat16"};
  char text[200];
  std::snprintf(text, sizeof text, "%s %s%s T=%d B=%d I=%d H=%d D=%d%s%s%s%s", traits_of(c.cell).name,
                dtypes[static_cast<int>(c.dtype)], c.tf32 ? " TF32" : "", c.T, c.B, c.I, c.H, c.D,
                c.lengths ? " lengths" : "", c.resets ? " resets" : "", c.states ? "" : " no states",
                c.grad_h0 ? "" : " no d_h0");
  return text;
}

// ---- 16-bit numbers, without CUDA's headers ----

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
// To the nearest, ties to even; values beyond the largest half become infinity.
inline uint16_t half_bits(double value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double size = std::fabs(value);
  if (std::isnan(value)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  const int exponent = size < std::ldexp(1.0, -14) ? -14 : std::ilogb(size);
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of 2^(exponent - 10)
  return static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 14) << 10)));
}
inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}
inline uint16_t bfloat_bits(double value) {
  const uint32_t bits = bits_of(static_cast<float>(value));
  return std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Element i of an array of a dtype.
inline void store(DType dtype, void* to, size_t i, double v) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(to)[i] = v; break;
    case DType::kFloat32: static_cast<float*>(to)[i] = static_cast<float>(v); break;
    case DType::kFloat16: static_cast<uint16_t*>(to)[i] = half_bits(v); break;
    case DType::kBFloat16: static_cast<uint16_t*>(to)[i] = bfloat_bits(v); break;
  }
}
inline double load(DType dtype, const void* from, size_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(from)[i];
    case DType::kFloat32: return static_cast<const float*>(from)[i];
    case DType::kFloat16: return half_value(static_cast<const uint16_t*>(from)[i]);
    case DType::kBFloat16: return float_of(uint32_t{static_cast<const uint16_t*>(from)[i]} << 16);
  }
  return NAN;
}
inline double rounded(DType dtype, double v) {
  double place;
  store(dtype, &place, 0, v);
  return load(dtype, &place, 0);
}

// ---- data and what is expected of them ----

struct Data {
  Doubles x, w_ih[2], w_hh[2], b_ih[2], b_hh[2], h0, c0;
  Doubles projection;  // [D, N, G, H], rounded
  std::vector<int64_t> lengths;
  std::vector<unsigned char> resets;
  Doubles dy, dh_n, dc_n;
  Doubles y, h_n, c_n, gates, cs, d_gates, d_h0, d_c0;  // expected
};

inline Data make_data(const Case& c, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(-1, 1);
  const auto randn = [&](size_t count) {
    Doubles v(count);
    for (double& e : v) e = rounded(c.dtype, normal(generator));
    return v;
  };
  const auto weight = [&](size_t count) {
    Doubles v(count);
    for (double& e : v) e = rounded(c.dtype, uniform(generator) / std::sqrt(double(c.H)));
    return v;
  };
  Data d;
  const size_t G = gate_count(c.cell), N = size_t(c.T) * c.B, H = c.H, I = c.I, units = size_t(c.D) * c.B * H;
  d.x = randn(N * I);
  for (int dir = 0; dir < c.D; ++dir) {
    d.w_ih[dir] = weight(G * H * I), d.w_hh[dir] = weight(G * H * H);
    d.b_ih[dir] = weight(G * H), d.b_hh[dir] = weight(G * H);
  }
  if (c.states) d.h0 = randn(units), d.c0 = randn(units);
  d.dy = randn(N * c.D * H), d.dh_n = randn(units), d.dc_n = randn(units);
  for (int b = 0; c.lengths && b < c.B; ++b) {
    d.lengths.push_back(b == 0 ? c.T : b == 1 ? 0 : 1 + static_cast<int>(generator() % c.T));
  }
  for (size_t i = 0; c.resets && i < N; ++i) d.resets.push_back(generator() % 10 < 3);
  d.projection.resize(c.D * N * G * H);
  for (int dir = 0; dir < c.D; ++dir) {
    for (size_t row = 0; row < N; ++row) {
      for (size_t o = 0; o < G * H; ++o) {
        double sum = d.b_ih[dir][o];
        for (size_t i = 0; i < I; ++i) sum += d.w_ih[dir][o * I + i] * d.x[row * I + i];
        d.projection[(dir * N + row) * G * H + o] = rounded(c.dtype, sum);
      }
    }
  }
  return d;
}

// One row of the batch in one direction.
template <CellKind kKind>
class RowReference {
  using C = Cell<kKind>;
  static constexpr int G = C::kGates, S = C::kSlots;

 public:
  RowReference(const Case& c, Data& d, int dir, int b)
      : c_(c), d_(d), dir_(dir), b_(b), H_(c.H), state_((size_t(dir) * c.B + b) * c.H) {}

  void run() {
    forward();
    backward();
  }

 private:
  int time(int step) const { return dir_ ? c_.T - 1 - step : step; }
  bool is_active(int t) const { return !c_.lengths || t < d_.lengths[b_]; }
  size_t row(int t) const { return size_t(t) * c_.B + b_; }
  size_t gate(int t, int slot, int u) const { return ((size_t(dir_) * c_.T * c_.B + row(t)) * S + slot) * H_ + u; }

  void forward() {
    Doubles h(H_), c(H_);
    if (c_.states) std::copy_n(&d_.h0[state_], H_, h.begin()), std::copy_n(&d_.c0[state_], H_, c.begin());
    before_h_.resize(c_.T), before_c_ = after_h_ = after_c_ = before_h_;
    for (int step = 0; step < c_.T; ++step) {
      const int t = time(step);
      if (!is_active(t)) continue;
      if (c_.resets && d_.resets[row(t)]) std::fill(h.begin(), h.end(), 0.0), std::fill(c.begin(), c.end(), 0.0);
      before_h_[t] = h, before_c_[t] = c;
      for (int u = 0; u < H_; ++u) unit_forward(t, u, h[u], c[u]);
      after_h_[t] = h, after_c_[t] = c;
    }
    std::copy(h.begin(), h.end(), &d_.h_n[state_]), std::copy(c.begin(), c.end(), &d_.c_n[state_]);
  }

  void unit_forward(int t, int u, double& h, double& c) {
    const size_t N = size_t(c_.T) * c_.B;
    double a[S] = {};
    for (int g = 0; g < G; ++g) a[g] += d_.projection[(dir_ * N + row(t)) * G * H_ + size_t(g) * H_ + u];
    for (int g = 0; g < G; ++g) {
      double sum = d_.b_hh[dir_][size_t(g) * H_ + u];
      const double* const w = &d_.w_hh[dir_][(size_t(g) * H_ + u) * H_];
      for (int k = 0; k < H_; ++k) sum += w[k] * before_h_[t][k];
      a[C::recurrent_slot(g)] += sum;
    }
    C::forward(a, before_h_[t][u], before_c_[t][u], h, c);
    for (int slot = 0; slot < C::kSaved; ++slot) d_.gates[gate(t, slot, u)] = a[slot];
    const size_t at = (dir_ * N + row(t)) * H_ + u;
    d_.cs[at] = c, d_.y[(row(t) * c_.D + dir_) * H_ + u] = h;
  }

  void backward() {
    Doubles dh(&d_.dh_n[state_], &d_.dh_n[state_] + H_), dc(H_);
    if (C::kHasC) std::copy_n(&d_.dc_n[state_], H_, dc.begin());
    for (int step = c_.T - 1; step >= 0; --step) {
      const int t = time(step);
      if (!is_active(t)) continue;
      Doubles next(H_);
      for (int u = 0; u < H_; ++u) {
        double a[S] = {}, da[S] = {};
        for (int slot = 0; slot < C::kSaved; ++slot) a[slot] = d_.gates[gate(t, slot, u)];
        next[u] = C::backward(a, before_h_[t][u], before_c_[t][u], after_c_[t][u], after_h_[t][u],
                              dh[u] + d_.dy[(row(t) * c_.D + dir_) * H_ + u], dc[u], da);
        for (int slot = 0; slot < S; ++slot) d_.d_gates[gate(t, slot, u)] = da[slot];
      }
      for (int g = 0; g < G; ++g) {
        for (int u = 0; u < H_; ++u) {
          const double v = d_.d_gates[gate(t, S - G + g, u)];
          const double* const w = &d_.w_hh[dir_][(size_t(g) * H_ + u) * H_];
          for (int k = 0; k < H_; ++k) next[k] += w[k] * v;
        }
      }
      dh = next;
      if (c_.resets && d_.resets[row(t)]) std::fill(dh.begin(), dh.end(), 0.0), std::fill(dc.begin(), dc.end(), 0.0);
    }
    std::copy(dh.begin(), dh.end(), &d_.d_h0[state_]), std::copy(dc.begin(), dc.end(), &d_.d_c0[state_]);
  }

  const Case& c_;
  Data& d_;
  const int dir_, b_, H_;
  const size_t state_;
  std::vector<Doubles> before_h_, before_c_, after_h_, after_c_;
};

inline void expect(const Case& c, Data& d) {
  const size_t N = size_t(c.T) * c.B, H = c.H, S = slot_count(c.cell), units = size_t(c.D) * c.B * H;
  d.y.assign(N * c.D * H, 0), d.h_n.assign(units, 0), d.c_n = d.h_n, d.d_h0 = d.h_n, d.d_c0 = d.h_n;
  d.gates.assign(c.D * N * S * H, 0), d.d_gates = d.gates, d.cs.assign(c.D * N * H, 0);
  dispatch_cell(c.cell, [&](auto kind) {
    for (int dir = 0; dir < c.D; ++dir) {
      for (int b = 0; b < c.B; ++b) RowReference<decltype(kind)::value>(c, d, dir, b).run();
    }
  });
}

}  // namespace torch_free
