// GridKernels<kMath> for one kind of arithmetic: family `grid`, 16 units a block. Included by grid_*.cu only.
#pragma once
#include "cuda/persistent/exchange_grid.cuh"
#include "cuda/persistent/persistent_backward.cuh"

namespace fused_rnn::cuda {

template <MathKind kMath, CellKind kCell, bool kBackward>
using GridGeometry = PersistentGeometry<kCell, kMath, 1, kBackward, GridExchange>;

template <MathKind kMath>
ForwardSequenceKernel GridKernels<kMath>::forward(CellKind cell) {
  return dispatch_kernel_cell(cell, [](auto kind) -> ForwardSequenceKernel {
    return &persistent_forward_kernel<GridGeometry<kMath, decltype(kind)::value, false>>;
  });
}
template <MathKind kMath>
BackwardSequenceKernel GridKernels<kMath>::backward(CellKind cell) {
  return dispatch_kernel_cell(cell, [](auto kind) -> BackwardSequenceKernel {
    return &persistent_backward_kernel<GridGeometry<kMath, decltype(kind)::value, true>>;
  });
}

}  // namespace fused_rnn::cuda
