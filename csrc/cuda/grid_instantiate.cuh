// GridKernels<kMath> for one kind of arithmetic: family `grid`, 16 units a block. Included by grid_*.cu only.
#pragma once
#include "exchange_grid.cuh"
#include "persistent_backward.cuh"

namespace fused_rnn::cuda {

template <MathKind kMath, CellKind kCell, bool kBackward>
using GridGeometry = PersistentGeometry<kCell, kMath, 1, kBackward, GridExchange>;

template <MathKind kMath>
ForwardSequenceKernel GridKernels<kMath>::forward(CellKind cell) {
  switch (kernel_cell(cell)) {
    case CellKind::kLstm: return &persistent_forward_kernel<GridGeometry<kMath, CellKind::kLstm, false>>;
    case CellKind::kGru: return &persistent_forward_kernel<GridGeometry<kMath, CellKind::kGru, false>>;
    default: return &persistent_forward_kernel<GridGeometry<kMath, CellKind::kRnnTanh, false>>;
  }
}
template <MathKind kMath>
BackwardSequenceKernel GridKernels<kMath>::backward(CellKind cell) {
  switch (kernel_cell(cell)) {
    case CellKind::kLstm: return &persistent_backward_kernel<GridGeometry<kMath, CellKind::kLstm, true>>;
    case CellKind::kGru: return &persistent_backward_kernel<GridGeometry<kMath, CellKind::kGru, true>>;
    default: return &persistent_backward_kernel<GridGeometry<kMath, CellKind::kRnnTanh, true>>;
  }
}

}  // namespace fused_rnn::cuda
