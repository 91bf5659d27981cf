// A stack of layers whose parts overlap on CUDA (overlap_cuda.cpp), as a function of autograd.
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/differentiable.h"
#include "torch/ops.h"
#include "torch/overlap_cuda.h"

namespace fused_rnn {
namespace {

// A tensor without elements that has t's version: it changes when t is written in place.
Tensor version_of(const Tensor& t) {
  const Tensor witness = at::empty({0}, t.options());
  torch::autograd::impl::set_version_counter(witness, torch::autograd::impl::version_counter(t));
  return witness;
}

// One node of the graph, whose backward overlaps too. Its results, in this order, are every layer's y, h_n, c_n, gates and
// cs. Only the last y goes to the caller, but where gradients are differentiated the others have gradients too. The caller
// may write into its results before backward runs: final states are not kept, and the last y is kept as layer_autograd.cpp
// does, as an alias with its version then.
class StackFunction : public torch::autograd::Function<StackFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                                                const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                                const StackCall* stack, const StackOutputs* made) {
    torch::autograd::variable_list results, saved{x,
                                                  tensor_of(h0),
                                                  tensor_of(c0),
                                                  own(stack->lengths),
                                                  tensor_of(stack->offsets),
                                                  tensor_of(stack->host_offsets),
                                                  own(stack->resets)};
    const auto append = [&](auto part) {
      for (const LayerOutputs& layer : made->layers) results.push_back(std::get<decltype(part)::value>(layer));
    };
    append(std::integral_constant<int, 0>{});
    append(std::integral_constant<int, 1>{});
    append(std::integral_constant<int, 2>{});
    append(std::integral_constant<int, 3>{});
    append(std::integral_constant<int, 4>{});
    const int64_t layers = stack->layers;
    saved.insert(saved.end(), results.begin(), results.begin() + layers - 1);
    saved.push_back(results[layers - 1].variable_data());
    saved.insert(saved.end(), results.begin() + 3 * layers, results.end());
    saved.insert(saved.end(), made->inputs.begin(), made->inputs.end());
    saved.insert(saved.end(), made->left.begin(), made->left.end());
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["output_version"] = version_of(results[layers - 1]);
    ctx->saved_data["output_version_then"] = static_cast<int64_t>(results[layers - 1]._version());
    ctx->saved_data["has_biases"] = stack->has_biases;
    ctx->saved_data["cell"] = static_cast<int64_t>(stack->cell);
    ctx->saved_data["layers"] = stack->layers;
    ctx->saved_data["bidirectional"] = stack->bidirectional;
    ctx->saved_data["dropout"] = stack->dropout;
    ctx->saved_data["need_x"] = x.requires_grad();
    ctx->saved_data["need_state"] = requires_grad(h0) || requires_grad(c0);
    const int64_t differentiable = stack->layers * (traits_of(stack->cell).has_c ? 3 : 2);
    ctx->mark_non_differentiable({results.begin() + differentiable, results.end()});
    ctx->set_materialize_grads(false);
    return results;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const int64_t layers = ctx->saved_data["layers"].toInt();
    const double dropout = ctx->saved_data["dropout"].toDouble();
    constexpr size_t kFixed = 7;
    const size_t dropouts = dropout > 0 ? layers - 1 : 0;
    constexpr int64_t kOfLayer = 3;  // y, gates, cs
    const at::TensorList all(saved), results = all.slice(kFixed, kOfLayer * layers),
                                     inputs = all.slice(kFixed + kOfLayer * layers, dropouts),
                                     left = all.slice(kFixed + kOfLayer * layers + dropouts, dropouts);
    const OptionalTensor h0 = optional_of(saved[1]), c0 = optional_of(saved[2]), lengths = optional_of(saved[3]),
                         offsets = optional_of(saved[4]), host_offsets = optional_of(saved[5]),
                         resets = optional_of(saved[6]);
    const StackCall stack{saved[0],
                          h0,
                          c0,
                          all.slice(kFixed + kOfLayer * layers + 2 * dropouts),
                          ctx->saved_data["has_biases"].toBool(),
                          lengths,
                          offsets,
                          host_offsets,
                          resets,
                          cell_of(ctx->saved_data["cell"].toInt()),
                          layers,
                          ctx->saved_data["bidirectional"].toBool(),
                          dropout};
    StackOutputs outputs{{}, inputs.vec(), left.vec()};
    std::vector<std::array<bool, 3>> masks;
    StackGradients given{optional_of(grads[layers - 1]), {}, {}};
    for (int64_t l = 0; l < layers; ++l) {
      outputs.layers.emplace_back(results[l], Tensor(), Tensor(), results[layers + l], results[2 * layers + l]);
      masks.push_back({l > 0 || ctx->saved_data["need_x"].toBool(), ctx->saved_data["need_state"].toBool(),
                       any_requires_grad(params_of_layer(stack.weights, l, layers))});
      given.dh_n.push_back(optional_of(grads[layers + l]));
      given.dc_n.push_back(traits_of(stack.cell).has_c ? optional_of(grads[2 * layers + l]) : std::nullopt);
    }
    if (ctx->saved_data["output_version"].toTensor()._version() != ctx->saved_data["output_version_then"].toInt()) {
      std::get<0>(outputs.layers.back()) = last_output(stack, outputs);
    }
    const bool hidden = std::any_of(grads.begin(), grads.begin() + layers - 1, [](const Tensor& t) { return t.defined(); });
    std::optional<std::vector<LayerGradients>> made;
    if (!hidden && !at::GradMode::is_enabled() && nothing_intercepts())
      made = overlapped_backward(stack, given, outputs, masks);
    if (!made) made = in_turn(stack, given, outputs, masks, grads);
    return gradients_of_arguments(stack, *made, masks);
  }

 private:
  // The last layer's y once more, of what is saved below it.
  static Tensor last_output(const StackCall& s, const StackOutputs& outputs) {
    const int64_t last = s.layers - 1, directions = s.bidirectional ? 2 : 1;
    const Tensor x = last == 0 ? s.x : s.dropout > 0 ? outputs.inputs[last - 1] : std::get<0>(outputs.layers[last - 1]);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(layer_op().call(x, states_of_layer(s.h0, last, directions, s.layers),
                                       states_of_layer(s.c0, last, directions, s.layers),
                                       params_of_layer(s.weights, last, s.layers), s.has_biases, s.lengths, s.offsets,
                                       s.resets, static_cast<int64_t>(s.cell), s.bidirectional, /*save=*/false));
  }

  // Layer by layer; differentiable where autograd asks for that: then an input is made of the output below it again. hidden:
  // gradients of the layers' outputs.
  static std::vector<LayerGradients> in_turn(const StackCall& s, const StackGradients& given, const StackOutputs& outputs,
                                             const std::vector<std::array<bool, 3>>& masks,
                                             const torch::autograd::variable_list& hidden) {
    const int64_t directions = s.bidirectional ? 2 : 1;
    std::vector<LayerGradients> made(s.layers);
    Tensor dy = tensor_of(given.dy);
    for (int64_t l = s.layers - 1; l >= 0; --l) {
      const auto& [y, h_n, c_n, gates, cs] = outputs.layers[l];
      Tensor x = l == 0 ? s.x : std::get<0>(outputs.layers[l - 1]);
      if (l > 0 && s.dropout > 0) {
        x = at::GradMode::is_enabled() ? dropped(x, outputs.left[l - 1], s.dropout) : outputs.inputs[l - 1];
      }
      made[l] = layer_backward_op().call(
          optional_of(dy), given.dh_n[l], given.dc_n[l], x, states_of_layer(s.h0, l, directions, s.layers),
          states_of_layer(s.c0, l, directions, s.layers), params_of_layer(s.weights, l, s.layers), s.has_biases, s.lengths,
          s.offsets, s.resets, y, gates, cs, static_cast<int64_t>(s.cell), s.bidirectional, masks[l]);
      if (l == 0) break;
      dy = std::get<0>(made[l]);
      if (s.dropout > 0) dy = dropped(dy, outputs.left[l - 1], s.dropout);
      if (hidden[l - 1].defined()) dy = at::add(dy, hidden[l - 1]);
    }
    return made;
  }

  static torch::autograd::variable_list gradients_of_arguments(const StackCall& s, const std::vector<LayerGradients>& made,
                                                               const std::vector<std::array<bool, 3>>& masks) {
    torch::autograd::variable_list result{Tensor(), Tensor(), Tensor()};
    std::vector<Tensor> dh0, dc0;
    if (masks[0][0]) result[0] = std::get<0>(made[0]);
    for (int64_t l = 0; l < s.layers; ++l) {
      const auto& [dx, dh, dc, dparams] = made[l];
      dh0.push_back(dh);
      dc0.push_back(dc);
      for (const Tensor& t : dparams) result.push_back(masks[l][2] ? t : Tensor());
    }
    if (masks[0][1] && s.h0) result[1] = at::cat(dh0);
    if (masks[0][1] && s.c0) result[2] = at::cat(dc0);
    result.resize(result.size() + 2);  // for forward's other arguments
    return result;
  }
};

}  // namespace

std::optional<std::tuple<Tensor, Tensor, Tensor>> overlapped_rnn(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& lengths, const OptionalTensor& offsets, const OptionalTensor& host_offsets,
    const OptionalTensor& resets, int64_t cell, int64_t num_layers, bool has_biases, bool bidirectional, double dropout,
    bool training, bool batch_first) {
  const auto plain = [](const Tensor& t) { return t.is_cuda() && is_plain(t); };
  if (!plain(input) || num_layers < 1 || weights.size() % num_layers || !nothing_intercepts() || (h0 && !plain(*h0)) ||
      (c0 && !plain(*c0)) || !std::all_of(weights.begin(), weights.end(), plain)) {
    return std::nullopt;
  }
  const Tensor x = batch_first ? input.transpose(0, 1) : input;
  const OptionalTensor steps_first = batch_first && resets ? OptionalTensor(resets->transpose(0, 1)) : resets;
  const StackCall call{x,
                       h0,
                       c0,
                       weights,
                       has_biases,
                       lengths,
                       offsets,
                       host_offsets,
                       steps_first,
                       cell_of(cell),
                       num_layers,
                       bidirectional,
                       training && num_layers > 1 ? dropout : 0.0};
  const bool differentiate = differentiates(x, h0, c0, weights);
  const auto made = overlapped_forward(call, differentiate);
  if (!made) return std::nullopt;
  std::vector<Tensor> h_n, c_n;
  Tensor y;
  if (differentiate) {
    const auto results = StackFunction::apply(x, h0, c0, weights, &call, &*made);
    y = results[num_layers - 1];
    h_n.assign(results.begin() + num_layers, results.begin() + 2 * num_layers);
    c_n.assign(results.begin() + 2 * num_layers, results.begin() + 3 * num_layers);
  } else {
    y = std::get<0>(made->layers.back());
    for (const auto& layer : made->layers) {
      h_n.push_back(std::get<1>(layer));
      c_n.push_back(std::get<2>(layer));
    }
  }
  return std::tuple(batch_first ? y.transpose(0, 1) : y, joined(h_n), joined(c_n));
}

}  // namespace fused_rnn
