// The kernels of the families `single` and `step`: their arguments, and how the host code (step_launch.cu,
// second_order_launch.cu) finds them. Each kind of arithmetic is compiled in files of its own, kernels_*.cu and
// second_order_*.cu.
#pragma once
#include "core/params.h"
#include "plan/step_geometry.h"

namespace fused_rnn::cuda {

// Arguments of kForward, kForwardInput, kForwardModified and kProject at one step.
struct ForwardStep {
  ForwardParams p;
  int64_t step;    // in scan order
  int stages;      // of the rings
  int copy_input;  // bytes that may be copied at once from x and w_ih
  int copy_state;  // from the recurrent state and w_hh; kProject: from hidden and w_hr
  void* c;         // [D, B, H] running c in the arithmetic type
  void* hidden;    // [D, B, H] h before the projection, in dtype; null without projection
};

// Arguments of kBackward, kBackwardModified and kStateGrad at one step. step == -1 asks kStateGrad for d_h0.
struct BackwardStep {
  BackwardParams p;
  int64_t step;
  int stages;
  int copy_bytes;  // from the weight operand and from d_gates (or d_h) rows
  void* carry;  // [D, B, H] in the arithmetic type: LSTM running dc; GRU the part of dh that bypasses the weights; else null
  void* carry_h;  // the part of dh that bypasses the weights: GRU `carry`; else [D, B, H] with zoneout of h, or null
};

// Arguments of kTangents and kProjectTangents at one step: p holds tangents, `primal` what the forward read and left whose
// tangents they are. p.primal is the host's.
struct TangentStep : ForwardStep {  // without a running c: cs has it
  Primal primal;
};

// Arguments of kDualBackward and kDualStateGrad at one step; [0]: of the values, [1]: of the tangents. step == -1 asks
// kDualStateGrad for the tangents of d_h0.
struct DualStep {
  BackwardParams p[2];
  int64_t step;
  int stages;
  int copy_bytes;
  void* carry[2];  // as BackwardStep's, [D, B, H]
};

using ForwardKernel = void (*)(ForwardStep);
using BackwardKernel = void (*)(BackwardStep);
using TangentKernel = void (*)(TangentStep);
using DualKernel = void (*)(DualStep);

// One per MathKind. cell: any cell (kernel_cell.h says which share a kernel).
template <MathKind kMath>
struct Kernels {
  static ForwardKernel forward(KernelRole role, CellKind cell, TileSize size);
  static BackwardKernel backward(KernelRole role, CellKind cell, TileSize size);
};

// Of fp32, TF32 and fp64.
template <MathKind kMath>
struct SecondOrderKernels {
  static TangentKernel tangents(KernelRole role, CellKind cell, TileSize size);
  static DualKernel dual_backward(KernelRole role, CellKind cell, TileSize size);
};

}  // namespace fused_rnn::cuda
