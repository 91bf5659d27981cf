// The ops of second derivatives and of tangents, the same on every device that has the scans; each device registers them.
#pragma once
#include "torch/layer.h"

namespace fused_rnn {

// By y, each of the last states, x, states, reset states and params; wanted: a recipe, and flags of x, states, weights.
std::vector<Tensor> layer_second_order(at::TensorList grads, const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                       at::TensorList states, at::TensorList params, at::TensorList rows,
                                       at::TensorList saved, at::IntArrayRef wanted);
// tangents.h's LayerJvpSignature.
std::vector<Tensor> layer_jvp(at::TensorList tangents, const Tensor& x, at::TensorList states, at::TensorList params,
                              at::TensorList rows, at::TensorList saved, at::IntArrayRef call);

}  // namespace fused_rnn
