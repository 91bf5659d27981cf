// Whole stacks by cuDNN, through torch's own ops: no state of cuDNN is ours, and what forward keeps for backward is opaque.
#pragma once
#include <string>

#include "torch/ops.h"

namespace fused_rnn {

// Why cuDNN cannot serve a stack's call, as a clause; empty: it can.
std::string cudnn_lacks(const Call& stack);
// Whether the packed rows of such a call lie as cuDNN takes them; else the layers serve it. Raises, as the layers do, unless
// all shapes, dtypes and memory are those of a stack.
bool cudnn_fits(const Call& stack);

// fused_rnn::rnn by cuDNN, of a call that it lacks nothing for and that fits. Masks of dropout are drawn as for the other
// families. Backward works in evaluation too; gradients that are to be differentiated come from the other families.
Results rnn_by_cudnn(const Call& stack);

}  // namespace fused_rnn
