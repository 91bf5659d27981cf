// The part of the planner that knows the step kernels, which the families kSingle and kStep consist of.
#pragma once
#include "plan/plan.h"

namespace fused_rnn {

// Places in the workspace, 256-byte aligned, in bytes.
struct WorkspaceLayout {
  int64_t carry, carry_bytes;  // [D, B, H] in the arithmetic type: running c (LSTM forward), running dc (LSTM backward), the
                               // part of dh that bypasses the weights (GRU backward); of dual numbers [2, D, B, H],
                               // values, then tangents
  int64_t carry_h, carry_h_bytes;  // [D, B, H] in the arithmetic type: of a modified backward, the part of dh that zoneout
                                   // passes by the weights (cells whose `carry` is not that part)
  int64_t hidden, hidden_bytes;    // [D, B, H] in dtype: h before the projection (forward, P != H)
  int64_t bytes;
};
WorkspaceLayout workspace_layout(const Problem& problem);

// A line for each kernel.
std::string to_string(const std::vector<KernelPlan>& kernels);

}  // namespace fused_rnn
