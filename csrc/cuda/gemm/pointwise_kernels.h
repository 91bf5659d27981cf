// The kernels of family `gemm`: their arguments, and how the host code (gemm_launch.cu) finds them. They make no products,
// so TF32 has those of fp32. Each other kind of arithmetic is compiled in a file of its own, gemm_*.cu.
#pragma once
#include "cuda/step/kernels.h"

namespace fused_rnn::cuda {

// The arguments of a step kernel, whose stages and copies do not matter here, and what products read and left.
struct PointwiseForwardStep {
  ForwardStep step;
  const void* sums;  // [D, B, G, H] of h W_hh^T, kProject: [D, B, P] of hidden W_hr^T; in the arithmetic type
  void* states;      // [D, B, P] in dtype: what the next step multiplies; null: the rows of y are that
};
struct PointwiseBackwardStep {
  BackwardStep step;
  const void* sums;  // [D, B, P] of d_gates W_hh, kBackward with a projection: [D, B, H] of d_h W_hr
  void* d_gates;     // [D, B, G, H] in dtype: the recurrent slots of each row's latest d_gates; null: they lie as rows of it
  void* d_h;         // [D, B, P] in dtype: a copy of the step's d_h; null where none is needed
};

using PointwiseForwardKernel = void (*)(PointwiseForwardStep);
using PointwiseBackwardKernel = void (*)(PointwiseBackwardStep);

// One per MathKind but kTf32.
template <MathKind kMath>
struct PointwiseKernels {
  static PointwiseForwardKernel forward(KernelRole role, CellKind cell);
  static PointwiseForwardKernel first_states();  // writes `states` for the first step
  static PointwiseBackwardKernel backward(KernelRole role, CellKind cell);
};

}  // namespace fused_rnn::cuda
