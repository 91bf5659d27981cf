// Forward and backward of a stack of layers on CUDA as wavefronts of chunks (plan/overlap.h). In a stack's call here x is
// [T, B, I] or packed [N, I], and recipe.dropout is 0 where there is none between the layers.
#pragma once
#include <array>

#include "torch/layer.h"

namespace fused_rnn {

// Gradients of a stack's results: of the last layer's output, and of the last states of each layer.
struct StackGradients {
  OptionalTensor dy;
  std::vector<std::vector<OptionalTensor>> of_last;
};

struct StackOutputs {
  std::vector<LayerOutputs> layers;
  // With dropout, one of each layer but the first: its input, and which elements of the output below it are left.
  std::vector<Tensor> inputs, left;
};

// What dropout leaves of a tensor, or of a gradient, by its mask. Differentiable.
Tensor dropped(const Tensor& t, const Tensor& left, double dropout);

// The results, or the gradients, of all layers; none where the layers are to be called in turn. save: whether they keep what
// backward needs. masks: layer_backward's; dx is made of the first layer only. Not differentiable.
std::optional<StackOutputs> overlapped_forward(const Call& stack, bool save);
std::optional<std::vector<LayerGradients>> overlapped_backward(const Call& stack, const StackGradients& given,
                                                               const StackOutputs& saved,
                                                               const std::vector<GradientMask>& masks);

}  // namespace fused_rnn
