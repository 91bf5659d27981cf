// Where to find a kernel of family `block`. Its arguments: cuda/persistent/sequence.h.
#pragma once
#include "cuda/persistent/sequence.h"

namespace fused_rnn::cuda {

// One specialisation per kind of arithmetic, in block_*.cu. cell: any cell (kernel_cell.h says which share a kernel).
template <MathKind kMath>
struct BlockKernels {
  static ForwardSequenceKernel forward(CellKind cell);
  static BackwardSequenceKernel backward(CellKind cell);
};

}  // namespace fused_rnn::cuda
