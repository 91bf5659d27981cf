// BlockKernels<kMath> for one kind of arithmetic: family `block`. Included by block_*.cu only.
#pragma once
#include "cuda/block/block_kernels.cuh"
#include "cuda/block/block_sequence.h"

namespace fused_rnn::cuda {

template <MathKind kMath>
ForwardSequenceKernel BlockKernels<kMath>::forward(CellKind cell) {
  return dispatch_kernel_cell(cell, [](auto kind) -> ForwardSequenceKernel {
    return &block_forward_kernel<BlockGeometry<decltype(kind)::value, kMath, false>>;
  });
}
template <MathKind kMath>
BackwardSequenceKernel BlockKernels<kMath>::backward(CellKind cell) {
  return dispatch_kernel_cell(cell, [](auto kind) -> BackwardSequenceKernel {
    return &block_backward_kernel<BlockGeometry<decltype(kind)::value, kMath, true>>;
  });
}

}  // namespace fused_rnn::cuda
