// Whole stacks by cuDNN, through torch's own ops: no state of cuDNN is ours, and what forward keeps for backward is opaque.
#pragma once
#include <string>

#include "torch/ops.h"

namespace fused_rnn {

// Why cuDNN cannot serve a stack's call, as a clause; empty: it can.
std::string cudnn_lacks(const Call& stack);
// Whether all shapes and dtypes of such a call are those of a stack. What does not fit is left to the layers, which say so.
bool cudnn_fits(const Call& stack);

// fused_rnn::rnn by cuDNN, of a call that it lacks nothing for and that fits. Masks of dropout are drawn as for the other
// families. Backward works in evaluation too; gradients that are to be differentiated come from the other families.
Results rnn_by_cudnn(const Call& stack);

}  // namespace fused_rnn
