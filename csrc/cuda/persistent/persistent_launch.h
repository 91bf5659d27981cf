// Host side of the families `grid` and `cluster`: one launch per layer, or several where the device does not hold all groups at
// once. Called by cuda.cu.
#pragma once
#include "cuda/backend.h"

namespace fused_rnn::cuda {

void persistent_forward(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream);
void persistent_backward(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream);

}  // namespace fused_rnn::cuda
