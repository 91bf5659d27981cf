// Which cells share a kernel: all RNNs, whose kernel chooses the nonlinearity at run time.
#pragma once
#include <type_traits>

#include "core/cells.h"
#include "core/dispatch.h"

namespace fused_rnn::cuda {

// The cell under whose name the kernels of `cell` are compiled.
constexpr FUSED_RNN_HD CellKind kernel_cell(CellKind cell) {
  switch (cell) {
#define FUSED_RNN_CELL(kind, ...) \
  case CellKind::kind:            \
    return std::is_base_of_v<RnnCell<CellKind::kind>, Cell<CellKind::kind>> ? CellKind::kRnnTanh : CellKind::kind;
    FUSED_RNN_CELLS(FUSED_RNN_CELL)
#undef FUSED_RNN_CELL
  }
  return cell;
}

// Calls f with the cell that names the kernels as a compile-time constant.
template <class F>
auto dispatch_kernel_cell(CellKind cell, F&& f) {
  return dispatch_cell(cell, [&](auto tag) { return f(CellTag<kernel_cell(decltype(tag)::value)>{}); });
}

}  // namespace fused_rnn::cuda
