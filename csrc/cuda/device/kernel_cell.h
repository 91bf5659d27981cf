// Which cells share a kernel: the three RNN kinds, whose kernel chooses the nonlinearity at run time.
#pragma once
#include "core/dispatch.h"

namespace fused_rnn::cuda {

// The cell under whose name the kernels of `cell` are compiled.
constexpr FUSED_RNN_HD CellKind kernel_cell(CellKind cell) {
  return cell == CellKind::kRnnRelu || cell == CellKind::kRnnIdentity ? CellKind::kRnnTanh : cell;
}

// Calls f with the cell that names the kernels as a compile-time constant.
template <class F>
auto dispatch_kernel_cell(CellKind cell, F&& f) {
  return dispatch_cell(cell, [&](auto tag) { return f(CellTag<kernel_cell(decltype(tag)::value)>{}); });
}

}  // namespace fused_rnn::cuda
