// Whole stacks by cuDNN, through torch's own ops: no state of cuDNN is ours, and what forward keeps for backward is opaque.
#pragma once
#include <torch/csrc/autograd/variable.h>

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

// A stack's call by `whole`, in parts whose x is [T, B, I] or packed and which drop nothing.
Results time_major_stacks(const Call& stack, Results (*whole)(const Call&));

// What cuDNN's forward for training makes of such a part; backward reads and writes the reserve.
struct CudnnOutputs {
  Tensor y;
  States last;
  Tensor reserve;
};
// Neither is differentiable.
CudnnOutputs cudnn_forward(const Call& part);
LayerGradients cudnn_backward(const Call& part, const CudnnOutputs& made, const OptionalTensor& dy,
                              const std::vector<OptionalTensor>& dlast, GradientMask mask);
// The gradients of x, states and params from those of the results, by layers of the other families: in a batch too, and such
// as can be differentiated again where autograd asks for that.
torch::autograd::variable_list gradients_by_layers(const Call& part, const torch::autograd::variable_list& grads);

}  // namespace fused_rnn
