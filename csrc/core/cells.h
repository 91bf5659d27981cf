// The math of every cell, once: one hidden unit at one step, forward and backward. V is float, double or a SIMD vector that
// has the arithmetic operators and sigmoid(V), tanh(V), relu(V), relu_mask(y, d) found by argument-dependent lookup or in
// fused_rnn::math. No torch, no CUDA include, no memory access: kernels load, call, store.
//
// Source of the formulas: the documentation of torch.nn.LSTM, GRU and RNN; LSTM after Hochreiter and Schmidhuber 1997 with
// the forget gate of Gers et al. 2000, GRU after Cho et al. 2014 in the variant whose reset gate multiplies W_hn h + b_hn.
//
// Every cell has
//   kGates, kSlots, kSaved, kHasC, kReadsH   what the list in params.h says of it; slots in the order of
//                                            ForwardParams::gates
//   recurrent_slot(g)  the accumulator that gate g of the recurrent product (and b_hh) is added to; gate g of the input
//                      product is added to slot g
//   forward(a, h_prev, c_prev, h, c)   a: accumulators in, saved values out; where there are gates with a sigmoid, in two
//                                      parts:
//   sigmoids(a), which depend on nothing else, and forward_of_sigmoids(a, h_prev, c_prev, h, c)
//   states(a, h_prev, c_prev, h, c)    the last part of forward: from the values that are saved
//   tangents(a)        a: saved values with the tangents of the accumulators (dual.h) in, with their own tangents out
//   backward(a, h_prev, c_prev, c, h, dh, dc, d) -> dh_prev
//        a: saved values, h_prev/c_prev: state before the step, c/h: state after, dh: total gradient of h,
//        dc: gradient of c from the next step in, of c_prev out, d: gradients in the slot order of BackwardParams::d_gates,
//        dh_prev: the part of the gradient of h_prev that does not go through the recurrent weights
// forward, forward_of_sigmoids, states and backward take, last, a modifier of the step (below), by default none:
//   unclipped(a, h_prev, c_prev, m)    of saved values: what forward gave to m.clipped
#pragma once
#include "core/params.h"

#ifdef __CUDACC__
#include <math.h>
#else
#include <cmath>
#endif

namespace fused_rnn {

namespace math {
// exp and tanh of the host's and the device's math library. Both forms saturate without overflow to NaN.
FUSED_RNN_HD float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FUSED_RNN_HD double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FUSED_RNN_HD float tanh(float x) { return ::tanhf(x); }
FUSED_RNN_HD double tanh(double x) { return ::tanh(x); }
// NaN stays NaN, as in torch.relu.
FUSED_RNN_HD float relu(float x) { return x < 0.0f ? 0.0f : x; }
FUSED_RNN_HD double relu(double x) { return x < 0.0 ? 0.0 : x; }
// d where y > 0, else 0: the gradient of relu at output y.
FUSED_RNN_HD float relu_mask(float y, float d) { return y > 0.0f ? d : 0.0f; }
FUSED_RNN_HD double relu_mask(double y, double d) { return y > 0.0 ? d : 0.0; }
}  // namespace math

// What may be done to a step inside of the cell. Another modifier has the same functions (cpu/isa/pointwise_modified.h).
struct Unmodified {
  // Of the candidate (LSTM's g, GRU's n), and of its gradient.
  template <class V>
  static FUSED_RNN_HD V candidate(const V& v) {
    return v;
  }
  // Of the new c, or of the new h of a cell without c; and of its gradient.
  template <class V>
  static FUSED_RNN_HD V clipped(const V& v) {
    return v;
  }
  template <class V>
  static FUSED_RNN_HD V clip_gradient(const V& d) {
    return d;
  }
};

// The list's line of a cell as constants.
template <CellKind kKind>
struct CellConstants {
  static constexpr int kGates = traits_of(kKind).gates, kSlots = traits_of(kKind).slots, kSaved = traits_of(kKind).saved;
  static constexpr bool kHasC = traits_of(kKind).has_c, kReadsH = traits_of(kKind).reads_h;
};

template <CellKind kKind>
struct Cell;

// h' = act(x W_ih^T + b_ih + h W_hh^T + b_hh)
template <CellKind kKind>
struct RnnCell : CellConstants<kKind> {
  using CellConstants<kKind>::kSlots;
  static constexpr FUSED_RNN_HD int recurrent_slot(int) { return 0; }

  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void states(const V (&a)[kSlots], const V&, const V&, V& h, V&, const M& m = M()) {
    h = m.clipped(a[0]);
  }
  // A modified step saves its h before the modifier.
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c, const M& m = M()) {
    using namespace math;
    if constexpr (kKind == CellKind::kRnnTanh) {
      a[0] = tanh(a[0]);
    } else if constexpr (kKind == CellKind::kRnnRelu) {
      a[0] = relu(a[0]);
    }
    states(a, h_prev, c_prev, h, c, m);
  }
  template <class D>
  static FUSED_RNN_HD void tangents(D (&a)[kSlots]) {
    if constexpr (kKind == CellKind::kRnnTanh) {
      tangent_of_tanh(a[0]);
    } else if constexpr (kKind == CellKind::kRnnRelu) {
      tangent_of_relu(a[0]);
    }
  }
  template <class V, class M>
  static FUSED_RNN_HD V unclipped(const V (&a)[kSlots], const V&, const V&, const M&) {
    return a[0];
  }

  // h: before the modifier.
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD V backward(const V (&)[kSlots], const V&, const V&, const V&, const V& h, const V& dh, V&,
                                 V (&d)[kSlots], const M& m = M()) {
    using namespace math;
    if constexpr (kKind == CellKind::kRnnTanh) {
      d[0] = m.clip_gradient(dh) * (V(1) - h * h);
    } else if constexpr (kKind == CellKind::kRnnRelu) {
      d[0] = relu_mask(h, m.clip_gradient(dh));
    } else {
      d[0] = m.clip_gradient(dh);
    }
    return V(0);
  }
};
template <>
struct Cell<CellKind::kRnnTanh> : RnnCell<CellKind::kRnnTanh> {};
template <>
struct Cell<CellKind::kRnnRelu> : RnnCell<CellKind::kRnnRelu> {};
template <>
struct Cell<CellKind::kRnnIdentity> : RnnCell<CellKind::kRnnIdentity> {};

// c' = f c + i g,  h' = o tanh(c')   (with a projection the kernel applies W_hr to this h')
template <>
struct Cell<CellKind::kLstm> : CellConstants<CellKind::kLstm> {
  static constexpr FUSED_RNN_HD int recurrent_slot(int gate) { return gate; }

  template <class V>
  static FUSED_RNN_HD void sigmoids(V (&a)[kSlots]) {
    using namespace math;
    a[0] = sigmoid(a[0]);
    a[1] = sigmoid(a[1]);
    a[3] = sigmoid(a[3]);
  }
  template <class V, class M>
  static FUSED_RNN_HD V unclipped(const V (&a)[kSlots], const V&, const V& c_prev, const M& m) {
    return a[1] * c_prev + a[0] * m.candidate(a[2]);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void states(const V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c, const M& m = M()) {
    using namespace math;
    c = m.clipped(unclipped(a, h_prev, c_prev, m));
    h = a[3] * tanh(c);
  }
  template <class D>
  static FUSED_RNN_HD void tangents(D (&a)[kSlots]) {
    tangent_of_sigmoid(a[0]);
    tangent_of_sigmoid(a[1]);
    tangent_of_tanh(a[2]);
    tangent_of_sigmoid(a[3]);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward_of_sigmoids(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c,
                                               const M& m = M()) {
    using namespace math;
    a[2] = tanh(a[2]);
    states(a, h_prev, c_prev, h, c, m);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c, const M& m = M()) {
    sigmoids(a);
    forward_of_sigmoids(a, h_prev, c_prev, h, c, m);
  }

  template <class V, class M = Unmodified>
  static FUSED_RNN_HD V backward(const V (&a)[kSlots], const V&, const V& c_prev, const V& c, const V&, const V& dh, V& dc,
                                 V (&d)[kSlots], const M& m = M()) {
    using namespace math;
    const V i = a[0], f = a[1], g = a[2], o = a[3];
    const V tanh_c = tanh(c);
    const V dc_total = m.clip_gradient(dc + dh * o * (V(1) - tanh_c * tanh_c));
    d[0] = dc_total * m.candidate(g) * i * (V(1) - i);
    d[1] = dc_total * c_prev * f * (V(1) - f);
    d[2] = m.candidate(dc_total * i) * (V(1) - g * g);
    d[3] = dh * tanh_c * o * (V(1) - o);
    dc = dc_total * f;
    return V(0);
  }
};

// n = tanh(x_n + r hn),  h' = n + z (h - n),  hn = W_hn h + b_hn
template <>
struct Cell<CellKind::kGru> : CellConstants<CellKind::kGru> {
  static constexpr FUSED_RNN_HD int recurrent_slot(int gate) { return gate == 2 ? 3 : gate; }

  template <class V>
  static FUSED_RNN_HD void sigmoids(V (&a)[kSlots]) {
    using namespace math;
    a[0] = sigmoid(a[0]);
    a[1] = sigmoid(a[1]);
  }
  template <class V, class M>
  static FUSED_RNN_HD V unclipped(const V (&a)[kSlots], const V& h_prev, const V&, const M& m) {
    const V n = m.candidate(a[2]);
    return n + a[1] * (h_prev - n);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void states(const V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V&, const M& m = M()) {
    h = m.clipped(unclipped(a, h_prev, c_prev, m));
  }
  template <class D>
  static FUSED_RNN_HD void tangents(D (&a)[kSlots]) {
    tangent_of_sigmoid(a[0]);
    tangent_of_sigmoid(a[1]);
    a[2].tangent = a[2].tangent + (a[0] * a[3]).tangent;
    tangent_of_tanh(a[2]);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward_of_sigmoids(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c,
                                               const M& m = M()) {
    using namespace math;
    a[2] = tanh(a[2] + a[0] * a[3]);
    states(a, h_prev, c_prev, h, c, m);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c, const M& m = M()) {
    sigmoids(a);
    forward_of_sigmoids(a, h_prev, c_prev, h, c, m);
  }

  template <class V, class M = Unmodified>
  static FUSED_RNN_HD V backward(const V (&a)[kSlots], const V& h_prev, const V&, const V&, const V&, const V& dh_after, V&,
                                 V (&d)[kSlots], const M& m = M()) {
    const V r = a[0], z = a[1], n = a[2], hn = a[3];
    const V dh = m.clip_gradient(dh_after);
    const V dn = m.candidate(dh * (V(1) - z)) * (V(1) - n * n);
    d[0] = dn;
    d[1] = dn * hn * r * (V(1) - r);
    d[2] = dh * (h_prev - m.candidate(n)) * z * (V(1) - z);
    d[3] = dn * r;
    return dh * z;
  }
};

// The slot of d_gates that is the gradient of gate `gate` of the input product (BackwardParams::d_gates): that of its
// recurrent product where both are added to one accumulator, else one of the first kSlots - kGates slots, in gate order.
template <class C>
constexpr int input_gradient_slot(int gate) {
  if (C::recurrent_slot(gate) == gate) return C::kSlots - C::kGates + gate;
  int slot = 0;
  for (int g = 0; g < gate; ++g) slot += C::recurrent_slot(g) != g;
  return slot;
}

}  // namespace fused_rnn
