// BlockKernels<kMath> for one kind of arithmetic: family `block`, 4 or 8 batch rows a block. Included by block_*.cu only.
#pragma once
#include "cuda/block/block_kernels.cuh"

namespace fused_rnn::cuda {

// Calls f with two compile-time constants: the cell under whose name the kernels are compiled, and the batch columns of a
// lane.
template <class F>
auto dispatch_block(CellKind cell, int columns, F&& f) {
  return dispatch_kernel_cell(cell, [&](auto kind) {
    return columns == 1 ? f(kind, std::integral_constant<int, 1>{}) : f(kind, std::integral_constant<int, 2>{});
  });
}

template <MathKind kMath>
ForwardSequenceKernel BlockKernels<kMath>::forward(CellKind cell, int columns) {
  return dispatch_block(cell, columns, [](auto kind, auto of_lane) -> ForwardSequenceKernel {
    return &block_forward_kernel<BlockGeometry<decltype(kind)::value, kMath, false, decltype(of_lane)::value>>;
  });
}
template <MathKind kMath>
BackwardSequenceKernel BlockKernels<kMath>::backward(CellKind cell, int columns) {
  return dispatch_block(cell, columns, [](auto kind, auto of_lane) -> BackwardSequenceKernel {
    return &block_backward_kernel<BlockGeometry<decltype(kind)::value, kMath, true, decltype(of_lane)::value>>;
  });
}

}  // namespace fused_rnn::cuda
