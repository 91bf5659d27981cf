// The cells of cells.h as the kernels use them: the three RNN kinds share one kernel, whose nonlinearity is chosen at run time.
#pragma once
#include "cells.h"

namespace fused_rnn::cuda {

// The kind that names the kernels of `cell`.
constexpr CellKind kernel_cell(CellKind cell) {
  return cell == CellKind::kRnnRelu || cell == CellKind::kRnnIdentity ? CellKind::kRnnTanh : cell;
}

template <CellKind kCell>
struct DeviceCell : Cell<kCell> {
  template <class V>
  static FUSED_RNN_HD void forward(CellKind, V (&a)[Cell<kCell>::kSlots], const V& h_prev, const V& c_prev, V& h, V& c) {
    Cell<kCell>::forward(a, h_prev, c_prev, h, c);
  }
  template <class V>
  static FUSED_RNN_HD void backward(CellKind, const V (&a)[Cell<kCell>::kSlots], const V& h_prev, const V& c_prev,
                                    const V& c, const V& h, const V& dh, V& dc, V (&d)[Cell<kCell>::kSlots], V& dh_prev) {
    Cell<kCell>::backward(a, h_prev, c_prev, c, h, dh, dc, d, dh_prev);
  }
};

template <>
struct DeviceCell<CellKind::kRnnTanh> : Cell<CellKind::kRnnTanh> {
  template <class V>
  static FUSED_RNN_HD void forward(CellKind kind, V (&a)[1], const V& h_prev, const V& c_prev, V& h, V& c) {
    switch (kind) {
      case CellKind::kRnnTanh: return Cell<CellKind::kRnnTanh>::forward(a, h_prev, c_prev, h, c);
      case CellKind::kRnnRelu: return Cell<CellKind::kRnnRelu>::forward(a, h_prev, c_prev, h, c);
      default: return Cell<CellKind::kRnnIdentity>::forward(a, h_prev, c_prev, h, c);
    }
  }
  template <class V>
  static FUSED_RNN_HD void backward(CellKind kind, const V (&a)[1], const V& h_prev, const V& c_prev, const V& c, const V& h,
                                    const V& dh, V& dc, V (&d)[1], V& dh_prev) {
    switch (kind) {
      case CellKind::kRnnTanh: return Cell<CellKind::kRnnTanh>::backward(a, h_prev, c_prev, c, h, dh, dc, d, dh_prev);
      case CellKind::kRnnRelu: return Cell<CellKind::kRnnRelu>::backward(a, h_prev, c_prev, c, h, dh, dc, d, dh_prev);
      default: return Cell<CellKind::kRnnIdentity>::backward(a, h_prev, c_prev, c, h, dh, dc, d, dh_prev);
    }
  }
};

}  // namespace fused_rnn::cuda
