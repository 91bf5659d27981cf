// The part of the planner that knows family `gemm`: products of a step by a library, the rest by a pointwise kernel.
#pragma once
#include "plan/plan.h"
#include "plan/step.h"

namespace fused_rnn {

// Places in the workspace, 256-byte aligned, in bytes: those of the step kernels, and what products read and leave.
struct GemmWorkspace {
  WorkspaceLayout step;
  // [D, B, columns] in the arithmetic type: what the latest product left; columns: G * H forward (P after a projection's),
  // backward P (H after a projection's).
  int64_t sums;
  // Rows of one step that do not lie beside each other elsewhere (ragged or modified layers), in dtype. Forward: [D, B, P]
  // the states that the next step multiplies. Backward: [D, B, G, H] the recurrent slots of d_gates.
  int64_t rows;
  int64_t d_h;  // [D, B, P] in dtype: the same of a projected layer's d_h
  int64_t bytes;
};
GemmWorkspace gemm_workspace(const Problem& problem);

}  // namespace fused_rnn
