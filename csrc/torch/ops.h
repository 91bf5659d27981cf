// C++ signatures of the ops' schemas (ops.cpp), for typed dispatch and for their registration in other files.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>

#include "torch/layer.h"

namespace fused_rnn {

using LayerSignature = LayerOutputs(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                                    int64_t recipe, bool save);

using LayerBackwardSignature = LayerGradients(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                              at::TensorList states, at::TensorList params, at::TensorList rows,
                                              at::TensorList saved, int64_t recipe, std::array<bool, 3> mask);

// What a schema's `int[] call` has of a backward: recipe, the three flags of the mask, samples; more may follow.
struct BackwardNumbers {
  int64_t recipe;
  std::array<bool, 3> mask;
  int64_t samples;  // 0: of layer_backward

  static BackwardNumbers of(at::IntArrayRef call) {
    TORCH_CHECK_VALUE(call.size() >= 5, "call: expected a recipe, a mask of 3 flags and samples, got ", call.size(),
                      " numbers");
    return {call[0], {call[1] != 0, call[2] != 0, call[3] != 0}, call[4]};
  }
  std::vector<int64_t> list() const { return {recipe, mask[0], mask[1], mask[2], samples}; }
};

// Sums over samples of their own: layer.h's gradients_of_layer.
using SampleBackwardSignature = LayerGradients(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                               at::TensorList states, at::TensorList params, at::TensorList rows,
                                               at::TensorList saved, at::IntArrayRef call);

// (d_gates [D, N, S, H], dstates)
using GateGradients = std::tuple<Tensor, std::vector<Tensor>>;
using GatesBackwardSignature = GateGradients(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                             at::TensorList states, at::TensorList params, at::TensorList rows,
                                             at::TensorList saved, int64_t recipe);

// The gradients of a backward's arguments from `grads`, those of its results. A flag for each of them, whether it is asked
// for, follows in `call`.
using DoubleBackwardSignature = std::vector<Tensor>(at::TensorList grads, const OptionalTensor& dy, at::TensorList dlast,
                                                    const Tensor& x, at::TensorList states, at::TensorList params,
                                                    at::TensorList rows, at::TensorList saved, at::IntArrayRef call);

using RnnSignature = std::tuple<Tensor, std::vector<Tensor>>(const Tensor& input, at::TensorList states,
                                                             at::TensorList weights, at::TensorList rows, int64_t recipe,
                                                             double dropout);

using CellSignature = std::vector<Tensor>(const Tensor& input, at::TensorList states, at::TensorList params, int64_t recipe);

// The ops, through the dispatcher.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}
const c10::TypedOperatorHandle<LayerBackwardSignature>& layer_backward_op();
const c10::TypedOperatorHandle<SampleBackwardSignature>& sample_backward_op();
LayerOutputs call_layer(const Call& call, bool save);

// y, and the last state of each kind. With recipe.all_states, of a layer then what its op adds (layer.h), of a stack then
// each state after every step [T, L * D, B, .], packed [N, L * D, .].
struct Results {
  Tensor y;
  States last;
};

Tensor dropout_between(const Tensor& y, double probability);
// The last states of all layers.
States joined(const std::vector<States>& of_layers);

// Each state of a layer after every step [T, D, B, .], packed [N, D, .]; what the layer's op adds is taken from made.last.
States take_all_states(const Call& layer, Results& made);
// Of all layers, along the second dimension, in memory of their own.
States joined_steps(const std::vector<States>& of_layers);

// A stack of layers, dropout between them, each by layer(Call) -> Results.
template <class Layer>
Results run_stack(const Call& stack, const Layer& layer) {
  const Recipe& recipe = stack.recipe;
  TORCH_CHECK_VALUE(stack.params.size() % recipe.num_layers == 0,
                    "weights: expected a multiple of num_layers=", recipe.num_layers, " tensors, got ", stack.params.size());
  Rows rows = stack.rows;
  if (recipe.batch_first && rows.resets) rows.resets = rows.resets->transpose(0, 1);
  Tensor y = recipe.batch_first ? stack.x.transpose(0, 1) : stack.x;
  std::vector<States> last, all_states;
  for (int64_t l = 0; l < recipe.num_layers; ++l) {
    const States states = states_of_layer(stack, l);
    if (!rows.reset_states.empty()) rows.reset_states = reset_states_of_layer(stack, l);
    if (rows.options.any()) rows.options = options_of_layer(stack, l);
    const Call of_layer{y, states, params_of_layer(stack, l), rows, recipe.of_layer()};
    Results made = layer(of_layer);
    if (recipe.all_states) all_states.push_back(take_all_states(of_layer, made));
    y = std::move(made.y);
    last.push_back(std::move(made.last));
    if (recipe.dropout > 0 && recipe.training && l + 1 < recipe.num_layers) y = dropout_between(y, recipe.dropout);
  }
  Results results{recipe.batch_first ? y.transpose(0, 1) : y, joined(last)};
  if (recipe.all_states) {
    const States all = joined_steps(all_states);
    results.last.append(all.begin(), all.end());
  }
  return results;
}

// Whether a call concerns the CPU kernels, and autograd, alone: autocast, dispatch modes, tracing, subclasses and the
// profiler have no part in it, so that it need not go through the dispatcher.
bool runs_plainly_on_cpu(const Call& call);
// fused_rnn::rnn, or with call.one_step fused_rnn::cell, of such a call.
Results run_on_cpu(const Call& call);
// The gradients of x and of the states of one such step; the rows that its weights' gradients are made of go to the node.
class WeightNode;
LayerGradients step_backward_on_cpu(const Call& call, const ResultGradients& given, GradientMask mask, WeightNode& weights);
// fused_rnn::layer_backward of such a call, and the total gradients of h [D, N, H], which second_order.cpp would make again.
std::pair<LayerGradients, Tensor> backward_keeping_dh(const Call& call, const ResultGradients& given, GradientMask mask);
// fused_rnn::rnn of a call with the device of its rows' integers as it is; fused_rnn::cell of a step.
Results run_composite(const Call& call);
// The ops themselves.
std::tuple<Tensor, std::vector<Tensor>> rnn_op(const Tensor& input, at::TensorList states, at::TensorList weights,
                                               at::TensorList rows, int64_t recipe, double dropout);
std::vector<Tensor> cell_op(const Tensor& input, at::TensorList states, at::TensorList params, int64_t recipe);

// Whether neither tracing nor functorch nor a mode has a part in calls.
bool nothing_intercepts();
// Whether transforms of torch.func (grad, vmap) have a part in calls, and nothing else has.
bool only_transforms();
// No subclass, no wrapper of a transform, no view that is to be resolved.
bool is_plain(const Tensor& t);
bool is_plain_on_cpu(const Tensor& t);
// The same where kernels of this build may serve the tensor, on a CPU or a GPU.
bool is_plain_for_kernels(const Tensor& t);
// Whether a call, of such tensors, concerns the kernels and autograd alone.
bool runs_plainly(const Call& call);

#ifdef FUSED_RNN_WITH_CUDA
// fused_rnn::rnn as a wavefront of chunks (plan/overlap.h), or none where the layers are to be called in turn.
std::optional<Results> overlapped_rnn(const Call& call);

// Lengths, offsets (int64) or resets (bool) of the host on input's device, without a copy that the host would have to wait
// for or that a capture would refuse.
Tensor on_cuda(const Tensor& rows, const Tensor& input);
#endif

}  // namespace fused_rnn
