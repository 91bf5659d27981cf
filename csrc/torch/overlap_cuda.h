// Forward and backward of a stack of layers on CUDA as wavefronts of chunks (plan_overlap.h).
#pragma once
#include <array>

#include "torch/layer.h"

namespace fused_rnn {

// The arguments of a stack; x: [T, B, I] or packed [N, I]; host_offsets: the offsets of packed rows where the host can read
// them; dropout: the probability between the layers, 0: none.
struct StackCall {
  const Tensor& x;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  at::TensorList weights;
  bool has_biases;
  const OptionalTensor& lengths;
  const OptionalTensor& offsets;
  const OptionalTensor& host_offsets;
  const OptionalTensor& resets;
  CellKind cell;
  int64_t layers;
  bool bidirectional;
  double dropout;
};

// Gradients of a stack's results: of the last layer's output, and of the final states of each layer.
struct StackGradients {
  OptionalTensor dy;
  std::vector<OptionalTensor> dh_n, dc_n;
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
std::optional<StackOutputs> overlapped_forward(const StackCall& stack, bool save);
std::optional<std::vector<LayerGradients>> overlapped_backward(const StackCall& stack, const StackGradients& given,
                                                               const StackOutputs& saved,
                                                               const std::vector<std::array<bool, 3>>& masks);

}  // namespace fused_rnn
