#include "torch/cudnn_cuda.h"

#include <ATen/Context.h>
#include <ATen/ops/_cudnn_rnn.h>
#include <ATen/ops/_cudnn_rnn_backward.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "plan/cudnn.h"
#include "torch/cudnn_weights_cuda.h"
#include "torch/device.h"
#include "torch/version.h"

namespace fused_rnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of each step of a packed input; empty: dense.
std::vector<int64_t> batch_sizes_of(const Rows& rows) {
  std::vector<int64_t> sizes;
  if (!rows.offsets) return sizes;
  const auto* offsets = rows.host_offsets->const_data_ptr<int64_t>();
  for (int64_t t = 0; t + 1 < rows.host_offsets->size(0); ++t) sizes.push_back(offsets[t + 1] - offsets[t]);
  return sizes;
}

int64_t steps_of(const Call& s) {
  return s.rows.offsets ? s.rows.host_offsets->size(0) - 1 : s.x.size(s.recipe.batch_first && s.x.dim() == 3);
}

// A call whose x is [T, B, I] or packed.
struct TimeMajor {
  const Tensor x;
  Call call;

  explicit TimeMajor(const Call& s)
      : x(s.recipe.batch_first && s.x.dim() == 3 ? s.x.transpose(0, 1) : s.x),
        call{x, s.states, s.params, s.rows, s.recipe} {
    call.recipe.batch_first = false;
  }
  TimeMajor(const TimeMajor&) = delete;
};

// What a call hands to cuDNN, beside x.
struct Arguments {
  CudnnStack numbers;
  Tensor weights, h0;
  OptionalTensor c0;
  std::vector<int64_t> batch_sizes;

  // buffer: the weights, if forward has made them.
  explicit Arguments(const Call& s, const Tensor& buffer = {})
      : numbers(s),
        weights(buffer.defined() ? buffer : cudnn_weights(numbers, s.params)),
        batch_sizes(batch_sizes_of(s.rows)) {
    const int64_t groups = s.recipe.num_layers * s.recipe.directions();
    const int64_t B = batch_sizes.empty() ? s.x.size(1) : batch_sizes[0];
    const auto zeros = [&](int64_t size) { return at::zeros({groups, B, size}, s.x.options().requires_grad(false)); };
    h0 = s.h0() ? *s.h0() : zeros(numbers.proj_size ? numbers.proj_size : numbers.hidden_size);
    if (state_count(s.recipe.cell) == 2) c0 = s.c0() ? *s.c0() : zeros(numbers.hidden_size);
  }
};

// With `save` cuDNN runs as for training, whether the module trains or not: it has no dropout to make here.
CudnnOutputs forward_of(const Call& s, const Arguments& a, bool save) {
  const CudnnStack& n = a.numbers;
  auto [y, h_n, c_n, reserve, weights] =
      at::_cudnn_rnn(s.x, s.params, n.per_layer, a.weights, a.h0, a.c0, n.mode, n.hidden_size, n.proj_size, n.num_layers,
                     /*batch_first=*/false, /*dropout=*/0, save, n.bidirectional, a.batch_sizes, /*dropout_state=*/{});
  return {y, state_count(s.recipe.cell) == 2 ? States{h_n, c_n} : States{h_n}, reserve};
}

// `reserve` is written.
LayerGradients backward_of(const Call& s, const Arguments& a, const CudnnOutputs& made, const OptionalTensor& dy,
                           const std::vector<OptionalTensor>& dlast, GradientMask mask) {
  const CudnnStack& n = a.numbers;
  const auto of_last = [&](size_t i) { return i < dlast.size() ? dlast[i] : std::nullopt; };
  auto [dx, dh0, dc0, dparams] = at::_cudnn_rnn_backward(
      s.x, s.params, n.per_layer, a.weights, a.h0, a.c0, made.y, dy, of_last(0), of_last(1), n.mode, n.hidden_size,
      n.proj_size, n.num_layers, /*batch_first=*/false, /*dropout=*/0, /*train=*/true, n.bidirectional, a.batch_sizes,
      /*dropout_state=*/{}, made.reserve, {mask.x, mask.states, mask.states && a.c0, mask.weights});
  std::vector<Tensor> dstates;
  for (size_t i = 0; i < s.states.size(); ++i) dstates.push_back(i == 0 ? dh0 : dc0);
  return {dx, dstates, dparams};
}

Results rnn_by_layers(Call s) {
  s.recipe.family = 0;
  return run_stack(s, [](const Call& layer) {
    LayerOutputs made = call_layer(layer, /*save=*/false);
    return Results{std::get<0>(made), {std::get<1>(made).begin(), std::get<1>(made).end()}};
  });
}

// Whether the packed rows of every step lie where the host's offsets say, B at first and never more.
bool fits_packed(const Call& s) {
  const std::vector<int64_t> sizes = batch_sizes_of(s.rows);
  int64_t rows = 0;
  for (size_t t = 0; t < sizes.size(); ++t) {
    if (sizes[t] < 1 || (t > 0 && sizes[t] > sizes[t - 1])) return false;
    rows += sizes[t];
  }
  return rows == s.x.size(0);
}

// The node of a stack. The caller may write into y before backward runs: it is kept as an alias with its version then, and
// made again where it was written (layer_autograd.cpp does likewise).
class CudnnFunction : public torch::autograd::Function<CudnnFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList states, at::TensorList params,
                               const Call* s) {
    const Arguments a(*s);
    const auto [y, last, reserve] = forward_of(*s, a, /*save=*/true);
    variable_list saved{x,        tensor_of(s->rows.offsets), tensor_of(s->rows.host_offsets), y.variable_data(), reserve,
                        a.weights};
    saved.insert(saved.end(), states.begin(), states.end());
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["states"] = static_cast<int64_t>(states.size());
    ctx->saved_data["recipe"] = pack(s->recipe);
    ctx->saved_data["output_version"] = version_of(y);
    ctx->saved_data["output_version_then"] = static_cast<int64_t>(y._version());
    ctx->saved_data["need_x"] = x.requires_grad();
    ctx->saved_data["need_states"] = any_requires_grad(states);
    ctx->saved_data["need_params"] = any_requires_grad(params);
    ctx->set_materialize_grads(false);
    variable_list results{y};
    results.insert(results.end(), last.begin(), last.end());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto state_count_given = ctx->saved_data["states"].toInt();
    const at::TensorList all(saved), states = all.slice(6, state_count_given), params = all.slice(6 + state_count_given);
    const Rows rows{std::nullopt, optional_of(saved[1]), std::nullopt, optional_of(saved[2])};
    const Call s{saved[0], states, params, rows, recipe_of(ctx->saved_data["recipe"].toInt(), 0)};
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) {
      return variable_list(2 + states.size() + params.size());
    }
    // Gradients in a batch (vmap) too: each run of cuDNN's backward writes into what forward reserved.
    if (at::GradMode::is_enabled() || !nothing_intercepts()) {
      variable_list result = gradients_by_layers(s, grads);
      result.emplace_back();  // of forward's last argument
      return result;
    }

    const Arguments a(s, saved[5]);
    CudnnOutputs made{saved[3], {}, saved[4]};
    const bool written =
        ctx->saved_data["output_version"].toTensor()._version() != ctx->saved_data["output_version_then"].toInt();
    if (written) {
      made = forward_of(s, a, /*save=*/true);
    } else if (torch::autograd::get_current_graph_task_keep_graph()) {
      made.reserve = made.reserve.clone();  // cuDNN writes into it
    }
    const GradientMask mask{ctx->saved_data["need_x"].toBool(), ctx->saved_data["need_states"].toBool(),
                            ctx->saved_data["need_params"].toBool()};
    const std::vector<OptionalTensor> dlast{optional_of(grads[1]), grads.size() > 2 ? optional_of(grads[2]) : std::nullopt};
    const auto [dx, dstates, dparams] = backward_of(s, a, made, optional_of(grads[0]), dlast, mask);
    variable_list result{mask.x ? dx : Tensor()};
    for (size_t i = 0; i < states.size(); ++i) result.push_back(mask.states ? dstates[i] : Tensor());
    for (size_t i = 0; i < params.size(); ++i) result.push_back(mask.weights ? dparams[i] : Tensor());
    result.emplace_back();  // of forward's last argument
    return result;
  }
};

// x is [T, B, I] or packed, without dropout.
Results whole_stack(const Call& s) {
  if (differentiates(s)) {
    const variable_list made = CudnnFunction::apply(s.x, s.states, s.params, &s);
    return {made[0], States(made.begin() + 1, made.end())};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Arguments a(s);
  CudnnOutputs made = forward_of(s, a, /*save=*/false);
  return {std::move(made.y), std::move(made.last)};
}

}  // namespace

variable_list gradients_by_layers(const Call& s, const variable_list& grads) {
  const bool differentiable = at::GradMode::is_enabled();
  const at::AutoGradMode with_grad(true);
  const Results again = rnn_by_layers(s);
  variable_list outputs, given, inputs, result;
  const variable_list results = [&] {
    variable_list list{again.y};
    list.insert(list.end(), again.last.begin(), again.last.end());
    return list;
  }();
  for (size_t i = 0; i < results.size(); ++i) {
    if (!grads[i].defined()) continue;
    outputs.push_back(results[i]);
    given.push_back(grads[i]);
  }
  variable_list all{s.x};
  all.insert(all.end(), s.states.begin(), s.states.end());
  all.insert(all.end(), s.params.begin(), s.params.end());
  for (const Tensor& t : all) {
    if (t.requires_grad()) inputs.push_back(t);
  }
  const variable_list made = torch::autograd::grad(outputs, inputs, given, /*retain_graph=*/true, differentiable,
                                                   /*allow_unused=*/true);
  auto next = made.begin();
  for (const Tensor& t : all) result.push_back(t.requires_grad() ? *next++ : Tensor());
  return result;
}

std::string cudnn_lacks(const Call& s) {
  const auto plain = [](const Tensor& t) { return is_on_device(t) && is_plain(t); };
  const OptionalTensor& offsets = s.rows.host_offsets;
  CudnnCall call{s.recipe.cell};
  call.enabled = has_cudnn();
  call.plain = nothing_intercepts() && plain(s.x) && std::all_of(s.states.begin(), s.states.end(), plain) &&
               std::all_of(s.params.begin(), s.params.end(), plain);
  call.deterministic = at::globalContext().deterministicAlgorithms();
  call.one_step = s.one_step;
  call.lengths = s.rows.lengths.has_value();
  call.resets = s.rows.resets.has_value();
  call.modified = s.rows.options.any() || !s.rows.reset_states.empty();
  call.offsets_on_host = !s.rows.offsets || (offsets && offsets->scalar_type() == at::kLong && offsets->is_contiguous() &&
                                             offsets->dim() == 1 && offsets->size(0) >= 2);
  if (!call.plain) return cudnn_lacks(call);  // other tensors may not even tell the rest
  call.empty = s.x.numel() == 0;
  if (call.offsets_on_host && !call.empty) call.T = steps_of(s);
  call.contiguous_states =
      std::all_of(s.states.begin(), s.states.end(), [](const Tensor& state) { return state.is_contiguous(); });
  call.wide_c = s.has_wide_c();
  return cudnn_lacks(call);
}

bool cudnn_fits(const Call& given) {
  const TimeMajor time_major(given);
  check_stack(time_major.call);
  return !given.rows.offsets || fits_packed(given);
}

Results time_major_stacks(const Call& given, Results (*whole)(const Call&)) {
  const Recipe& recipe = given.recipe;
  TimeMajor time_major(given);
  Call& call = time_major.call;
  const bool masks = recipe.training && recipe.dropout > 0 && recipe.num_layers > 1;
  call.recipe.dropout = masks ? recipe.dropout : 0;
  Results made = masks ? run_stack(call, whole) : whole(call);
  if (recipe.batch_first) made.y = made.y.transpose(0, 1);
  return made;
}

Results rnn_by_cudnn(const Call& given) {
  const c10::cuda::CUDAGuard device_guard(given.x.device());
  return time_major_stacks(given, whole_stack);
}

CudnnOutputs cudnn_forward(const Call& s) { return forward_of(s, Arguments(s), /*save=*/true); }

LayerGradients cudnn_backward(const Call& s, const CudnnOutputs& made, const OptionalTensor& dy,
                              const std::vector<OptionalTensor>& dlast, GradientMask mask) {
  return backward_of(s, Arguments(s), made, dy, dlast, mask);
}

}  // namespace fused_rnn
