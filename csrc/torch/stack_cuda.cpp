// A stack of layers whose parts overlap on CUDA (overlap_cuda.cpp), as a function of autograd.
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/device.h"
#include "torch/ops.h"
#include "torch/overlap_cuda.h"
#include "torch/version.h"

namespace fused_rnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Lists of tensors one after the other, as save_for_backward keeps them, with the length of each.
struct Lists {
  variable_list tensors;
  std::vector<int64_t> lengths;

  void add(at::TensorList list) {
    tensors.insert(tensors.end(), list.begin(), list.end());
    lengths.push_back(static_cast<int64_t>(list.size()));
  }
};

// The lists of a Lists, taken in the order in which they were added.
class ListReader {
 public:
  ListReader(at::TensorList tensors, c10::IntArrayRef lengths) : tensors_(tensors), lengths_(lengths) {}
  at::TensorList next() {
    const at::TensorList list = tensors_.slice(begin_, lengths_[number_]);
    begin_ += lengths_[number_++];
    return list;
  }

 private:
  at::TensorList tensors_;
  c10::IntArrayRef lengths_;
  size_t begin_ = 0, number_ = 0;
};

// One node of the graph, whose backward overlaps too. Its results are every layer's y, then every layer's last states, then
// what every layer saved. Only the last y goes to the caller, but where gradients are differentiated the others have
// gradients too. The caller may write into its results before backward runs: last states are not kept, and the last y is
// kept as layer_autograd.cpp does, as an alias with its version then.
class StackFunction : public torch::autograd::Function<StackFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList states, at::TensorList weights,
                               const Call* stack, const StackOutputs* made) {
    variable_list ys, results;
    for (const LayerOutputs& layer : made->layers) ys.push_back(std::get<0>(layer));
    results = ys;
    for (const LayerOutputs& layer : made->layers) {
      results.insert(results.end(), std::get<1>(layer).begin(), std::get<1>(layer).end());
    }
    const auto differentiable = static_cast<int64_t>(results.size());
    for (const LayerOutputs& layer : made->layers) {
      results.insert(results.end(), std::get<2>(layer).begin(), std::get<2>(layer).end());
    }
    const Tensor last_y = ys.back();
    ys.back() = last_y.variable_data();
    const Rows& rows = stack->rows;
    Lists saved;
    saved.add(Tensor(x));
    saved.add(states);
    saved.add(weights);
    saved.add(variable_list{owned(rows.lengths), tensor_of(rows.offsets), tensor_of(rows.host_offsets), owned(rows.resets)});
    saved.add(ys);
    for (const LayerOutputs& layer : made->layers) saved.add(std::get<2>(layer));
    saved.add(made->inputs);
    saved.add(made->left);
    ctx->save_for_backward(std::move(saved.tensors));
    ctx->saved_data["lengths"] = saved.lengths;
    ctx->saved_data["output_version"] = version_of(last_y);
    ctx->saved_data["output_version_then"] = static_cast<int64_t>(last_y._version());
    ctx->saved_data["recipe"] = pack(stack->recipe);
    ctx->saved_data["dropout"] = stack->recipe.dropout;
    ctx->saved_data["need_x"] = x.requires_grad();
    ctx->saved_data["need_states"] = any_requires_grad(states);
    ctx->mark_non_differentiable({results.begin() + differentiable, results.end()});
    ctx->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto tensors = ctx->get_saved_variables();
    const auto lengths = ctx->saved_data["lengths"].toIntVector();
    ListReader saved(tensors, lengths);
    const at::TensorList x = saved.next(), states = saved.next(), weights = saved.next(), of_rows = saved.next(),
                         ys = saved.next();
    const Rows rows{optional_of(of_rows[0]), optional_of(of_rows[1]), optional_of(of_rows[3]), optional_of(of_rows[2])};
    const Recipe recipe = recipe_of(ctx->saved_data["recipe"].toInt(), ctx->saved_data["dropout"].toDouble());
    const Call stack{x[0], states, weights, rows, recipe};
    StackOutputs outputs;
    for (const Tensor& y : ys) outputs.layers.emplace_back(y, std::vector<Tensor>(), saved.next().vec());
    outputs.inputs = saved.next().vec();
    outputs.left = saved.next().vec();

    const int64_t layers = recipe.num_layers, last_states = state_count(recipe.cell);
    std::vector<GradientMask> masks;
    StackGradients given{optional_of(grads[layers - 1]), {}};
    for (int64_t l = 0; l < layers; ++l) {
      masks.push_back({l > 0 || ctx->saved_data["need_x"].toBool(), ctx->saved_data["need_states"].toBool(),
                       any_requires_grad(params_of_layer(stack, l))});
      given.of_last.emplace_back();
      for (int64_t i = 0; i < last_states; ++i) {
        given.of_last.back().push_back(optional_of(grads[layers + l * last_states + i]));
      }
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
  // The input of a layer, of what is saved below it.
  static Tensor input_of(const Call& s, const StackOutputs& outputs, int64_t layer) {
    if (layer == 0) return s.x;
    return s.recipe.dropout > 0 ? outputs.inputs[layer - 1] : std::get<0>(outputs.layers[layer - 1]);
  }

  // The last layer's y once more.
  static Tensor last_output(const Call& s, const StackOutputs& outputs) {
    const int64_t last = s.recipe.num_layers - 1;
    const Tensor x = input_of(s, outputs, last);
    const States states = states_of_layer(s, last);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(call_layer({x, states, params_of_layer(s, last), s.rows, s.recipe.of_layer()}, /*save=*/false));
  }

  // Layer by layer; differentiable where autograd asks for that: then an input is made of the output below it again. hidden:
  // gradients of the layers' outputs.
  static std::vector<LayerGradients> in_turn(const Call& s, const StackGradients& given, const StackOutputs& outputs,
                                             const std::vector<GradientMask>& masks, const variable_list& hidden) {
    const double dropout = s.recipe.dropout;
    std::vector<LayerGradients> made(s.recipe.num_layers);
    Tensor dy = tensor_of(given.dy);
    for (int64_t l = s.recipe.num_layers - 1; l >= 0; --l) {
      const auto& [y, last, saved] = outputs.layers[l];
      const bool again = l > 0 && dropout > 0 && at::GradMode::is_enabled();
      const Tensor x =
          again ? dropped(std::get<0>(outputs.layers[l - 1]), outputs.left[l - 1], dropout) : input_of(s, outputs, l);
      std::vector<Tensor> saved_with_y = saved;
      saved_with_y.push_back(y);
      States dlast;
      for (const OptionalTensor& t : given.of_last[l]) dlast.push_back(t ? *t : at::empty({0}, x.options()));
      const RowList rows = list_of(s.rows);
      made[l] = layer_backward_op().call(optional_of(dy), dlast, x, states_of_layer(s, l), params_of_layer(s, l),
                                         rows.tensors, saved_with_y, pack(s.recipe.of_layer()) | rows.bits,
                                         {masks[l].x, masks[l].states, masks[l].weights});
      if (l == 0) break;
      dy = std::get<0>(made[l]);
      if (dropout > 0) dy = dropped(dy, outputs.left[l - 1], dropout);
      if (hidden[l - 1].defined()) dy = at::add(dy, hidden[l - 1]);
    }
    return made;
  }

  static variable_list gradients_of_arguments(const Call& s, const std::vector<LayerGradients>& made,
                                              const std::vector<GradientMask>& masks) {
    variable_list result{masks[0].x ? std::get<0>(made[0]) : Tensor()};
    for (size_t i = 0; i < s.states.size(); ++i) {
      std::vector<Tensor> of_layers;
      for (const LayerGradients& layer : made) of_layers.push_back(std::get<1>(layer)[i]);
      result.push_back(masks[0].states ? at::cat(of_layers) : Tensor());
    }
    for (size_t l = 0; l < made.size(); ++l) {
      for (const Tensor& t : std::get<2>(made[l])) result.push_back(masks[l].weights ? t : Tensor());
    }
    result.resize(result.size() + 2);  // for forward's other arguments
    return result;
  }
};

}  // namespace

std::optional<Results> overlapped_rnn(const Call& given) {
  const Recipe& recipe = given.recipe;
  const auto plain = [](const Tensor& t) { return is_on_device(t) && is_plain(t); };
  if (!plain(given.x) || given.params.size() % recipe.num_layers || !nothing_intercepts() ||
      !std::all_of(given.states.begin(), given.states.end(), plain) ||
      !std::all_of(given.params.begin(), given.params.end(), plain)) {
    return std::nullopt;
  }
  const Tensor x = recipe.batch_first ? given.x.transpose(0, 1) : given.x;
  Rows rows = given.rows;
  if (recipe.batch_first && rows.resets) rows.resets = rows.resets->transpose(0, 1);
  Call call{x, given.states, given.params, rows, recipe};
  if (!recipe.training || recipe.num_layers == 1) call.recipe.dropout = 0;
  const bool differentiate = differentiates(call);
  const auto made = overlapped_forward(call, differentiate);
  if (!made) return std::nullopt;
  std::vector<States> last;
  Tensor y;
  if (differentiate) {
    const auto results = StackFunction::apply(x, call.states, call.params, &call, &*made);
    y = results[recipe.num_layers - 1];
    auto next = results.begin() + recipe.num_layers;
    for (const LayerOutputs& layer : made->layers) {
      last.emplace_back(next, next + std::get<1>(layer).size());
      next += std::get<1>(layer).size();
    }
  } else {
    y = std::get<0>(made->layers.back());
    for (const LayerOutputs& layer : made->layers) last.emplace_back(std::get<1>(layer).begin(), std::get<1>(layer).end());
  }
  return Results{recipe.batch_first ? y.transpose(0, 1) : y, joined(last)};
}

}  // namespace fused_rnn
