// The cells of cells.h as the kernels use them: the three RNN kinds share one kernel, whose nonlinearity is chosen at run
// time.
#pragma once
#include <simt.cuh>

#include "core/cells.h"
#include "cuda/device/kernel_cell.h"

namespace fused_rnn::cuda {

// c0 at `index`, which must be there, and c_n (params.h, wide_c).
template <class Storage>
__device__ __forceinline__ auto load_c0(const ForwardParams& p, int64_t index) {
  using Acc = decltype(simt::to_float(Storage{}));
  return p.wide_c ? Acc(static_cast<const float*>(p.c0)[index]) : simt::to_float(static_cast<const Storage*>(p.c0)[index]);
}
template <class Storage, class Acc>
__device__ __forceinline__ void store_c_n(const ForwardParams& p, int64_t index, Acc c) {
  if (p.wide_c) {
    static_cast<float*>(p.c_n)[index] = static_cast<float>(c);
  } else {
    static_cast<Storage*>(p.c_n)[index] = simt::from_float<Storage>(c);
  }
}

// A float whose sigmoid takes four instructions without a branch, two of them on the special function units. The math
// library's exp and quotient branch, so that a step would wait for one sigmoid after another. The error of this sigmoid is
// below 2e-7: 2 ulp of exp2, 1 of the reciprocal, and the rounding of the exponent. Results below 2^-126 become 0.
struct DeviceFloat {
  float v;
  DeviceFloat() = default;
  FUSED_RNN_HD explicit DeviceFloat(float value) : v(value) {}
};
FUSED_RNN_HD DeviceFloat operator+(DeviceFloat a, DeviceFloat b) { return DeviceFloat(a.v + b.v); }
FUSED_RNN_HD DeviceFloat operator-(DeviceFloat a, DeviceFloat b) { return DeviceFloat(a.v - b.v); }
FUSED_RNN_HD DeviceFloat operator*(DeviceFloat a, DeviceFloat b) { return DeviceFloat(a.v * b.v); }
__device__ __forceinline__ DeviceFloat sigmoid(DeviceFloat x) {
  return DeviceFloat(simt::reciprocal(1.0f + simt::exp2(-1.44269504f * x.v)));
}
__device__ __forceinline__ DeviceFloat tanh(DeviceFloat x) { return DeviceFloat(math::tanh(x.v)); }

FUSED_RNN_HD float number_of(DeviceFloat x) { return x.v; }
FUSED_RNN_HD float number_of(float x) { return x; }
FUSED_RNN_HD double number_of(double x) { return x; }

// Calls f with the array's values as DeviceFloats, and copies back what f leaves in them.
template <int kCount, class F>
__device__ __forceinline__ void as_device_floats(float (&a)[kCount], F&& f) {
  DeviceFloat values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i].v = a[i];
  f(values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) a[i] = values[i].v;
}

// A cell whose step has a modifier.
template <class M>
struct ModifiedKind {
  CellKind kind;
  const M& m;
};

// m: cells.h's modifier of the step. D: dual numbers (core/dual.h), which backward takes too.
template <CellKind kCell>
struct DeviceCell : Cell<kCell> {
  template <class D>
  static FUSED_RNN_HD void tangents(CellKind, D (&a)[Cell<kCell>::kSlots]) {
    Cell<kCell>::tangents(a);
  }
  template <class M = Unmodified>
  static __device__ __forceinline__ void forward(CellKind cell, float (&a)[Cell<kCell>::kSlots], float h_prev, float c_prev,
                                                 float& h, float& c, const M& m = M()) {
    sigmoids(a);
    forward_of_sigmoids(cell, a, h_prev, c_prev, h, c, m);
  }
  // The two parts of forward. With a fence between them the sigmoids run side by side. Without it the compiler begins one of
  // the sigmoids only after the tanh of the new c, which does not depend on it.
  static __device__ __forceinline__ void sigmoids(float (&a)[Cell<kCell>::kSlots]) {
    as_device_floats(a, [](DeviceFloat(&slots)[Cell<kCell>::kSlots]) { Cell<kCell>::sigmoids(slots); });
  }
  template <class M = Unmodified>
  static __device__ __forceinline__ void forward_of_sigmoids(CellKind, float (&a)[Cell<kCell>::kSlots], float h_prev,
                                                             float c_prev, float& h, float& c, const M& m = M()) {
    DeviceFloat new_h, new_c;
    as_device_floats(a, [&](DeviceFloat(&slots)[Cell<kCell>::kSlots]) {
      Cell<kCell>::forward_of_sigmoids(slots, DeviceFloat(h_prev), DeviceFloat(c_prev), new_h, new_c, m);
    });
    h = new_h.v;
    if constexpr (Cell<kCell>::kHasC) c = new_c.v;
  }
  template <class M = Unmodified>
  static FUSED_RNN_HD void forward(CellKind, double (&a)[Cell<kCell>::kSlots], double h_prev, double c_prev, double& h,
                                   double& c, const M& m = M()) {
    Cell<kCell>::forward(a, h_prev, c_prev, h, c, m);
  }
  template <class V>
  static FUSED_RNN_HD V backward(CellKind, const V (&a)[Cell<kCell>::kSlots], const V& h_prev, const V& c_prev, const V& c,
                                 const V& h, const V& dh, V& dc, V (&d)[Cell<kCell>::kSlots]) {
    return Cell<kCell>::backward(a, h_prev, c_prev, c, h, dh, dc, d);
  }
  template <class V, class M>
  static FUSED_RNN_HD V backward(const ModifiedKind<M>& of, const V (&a)[Cell<kCell>::kSlots], const V& h_prev,
                                 const V& c_prev, const V& c, const V& h, const V& dh, V& dc, V (&d)[Cell<kCell>::kSlots]) {
    return Cell<kCell>::backward(a, h_prev, c_prev, c, h, dh, dc, d, of.m);
  }
};

template <>
struct DeviceCell<CellKind::kRnnTanh> : Cell<CellKind::kRnnTanh> {
  template <class D>
  static FUSED_RNN_HD void tangents(CellKind kind, D (&a)[1]) {
    with_rnn(kind, [&](auto tag) { Cell<decltype(tag)::value>::tangents(a); });
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward(CellKind kind, V (&a)[1], const V& h_prev, const V& c_prev, V& h, V& c,
                                   const M& m = M()) {
    with_rnn(kind, [&](auto tag) { Cell<decltype(tag)::value>::forward(a, h_prev, c_prev, h, c, m); });
  }
  static __device__ __forceinline__ void sigmoids(float (&)[1]) {}
  static __device__ __forceinline__ void forward_of_sigmoids(CellKind kind, float (&a)[1], float h_prev, float c_prev,
                                                             float& h, float& c) {
    forward(kind, a, h_prev, c_prev, h, c);
  }
  template <class V>
  static FUSED_RNN_HD V backward(CellKind kind, const V (&a)[1], const V& h_prev, const V& c_prev, const V& c, const V& h,
                                 const V& dh, V& dc, V (&d)[1]) {
    with_rnn(kind, [&](auto tag) { Cell<decltype(tag)::value>::backward(a, h_prev, c_prev, c, h, dh, dc, d); });
    return V(0);  // of every RNN
  }
  template <class V, class M>
  static FUSED_RNN_HD V backward(const ModifiedKind<M>& of, const V (&a)[1], const V& h_prev, const V& c_prev, const V& c,
                                 const V& h, const V& dh, V& dc, V (&d)[1]) {
    with_rnn(of.kind, [&](auto tag) { Cell<decltype(tag)::value>::backward(a, h_prev, c_prev, c, h, dh, dc, d, of.m); });
    return V(0);
  }

 private:
  // Calls f with the cell of this kernel that is wanted at run time.
  template <class F>
  static FUSED_RNN_HD void with_rnn(CellKind kind, F&& f) {
    switch (kind) {
#define FUSED_RNN_CELL(kind, ...)                                                                                 \
  case CellKind::kind:                                                                                            \
    if constexpr (std::is_base_of_v<RnnCell<CellKind::kind>, Cell<CellKind::kind>>) f(CellTag<CellKind::kind>{}); \
    break;
      FUSED_RNN_CELLS(FUSED_RNN_CELL)
#undef FUSED_RNN_CELL
    }
  }
};

}  // namespace fused_rnn::cuda
