// A layer whose backward runs forward again between states that are kept every k steps (cpu/scan/checkpoint.h): the ops
// layer_checkpointed and its backward, on a CPU. Fake kernels, autograd and what calls them: fused_rnn/_checkpoint.py.
//
// kept: h before every k-th step [D, K, B, P], then c [D, K, B, H] of a cell that has one, float where the dtype has 16
// bits.
// What backward holds of all steps while it runs is y, made again, and the gradients of gates: products over all rows give
// the gradients of the weights, in the order of a layer that keeps everything.
#include "cpu/scan/checkpoint.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "torch/ids.h"
#include "torch/layer.h"
#include "torch/ops.h"
#include "torch/workspace.h"

namespace fused_rnn {
namespace {

std::vector<Tensor> empty_checkpoints(const Call& call, const ForwardCall& made, int64_t every) {
  const ForwardParams& p = made.params;
  const int64_t count = p.seq.T > 0 ? (p.seq.T - 1) / every : 0;
  std::vector<Tensor> checkpoints{empty_like(call.like(), {p.D, count, p.seq.B, p.P})};
  if (traits_of(p.cell).has_c) {
    const auto arithmetic = at::toOpMathType(call.like().scalar_type());
    checkpoints.push_back(at::empty({p.D, count, p.seq.B, p.H}, call.like().options().dtype(arithmetic)));
  }
  return checkpoints;
}

// k, of the ops' argument [recipe, k].
int64_t every_of(at::IntArrayRef call) {
  TORCH_CHECK_VALUE(call.size() == 2 && call[1] >= 1, "recipe_and_every: expected a recipe and a number of at least 1, got ",
                    call);
  return call[1];
}

LayerOutputs layer_checkpointed_cpu(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                                    at::IntArrayRef recipe_and_every) {
  const int64_t every = every_of(recipe_and_every), recipe = recipe_and_every[0];
  const Rows given = rows_of(rows, recipe);
  const Call call{x, states, params, given, layer_recipe_of(recipe)};
  ForwardCall made = prepare_forward(call, /*save=*/false);
  std::vector<Tensor> checkpoints = empty_checkpoints(call, made, every);
  if (made.params.seq.B > 0) {
    if (call.has_ids()) gather_input_product(call, made);
    cpu::ForwardPart part;
    part.every = every;
    part.c = checkpoints.size() > 1 ? data_or_null(checkpoints[1]) : nullptr;
    Workspace workspace;
    cpu::forward_part(made.params, part, [&](int64_t bytes) { return workspace.take(bytes); });
    if (checkpoints[0].numel() > 0) cpu::take_outputs(made.params, every, checkpoints[0].data_ptr());
  }
  const States last = made.last();
  return {made.y, {last.begin(), last.end()}, std::move(checkpoints)};
}

// Backward of a call by ranges of steps. Leaves forward's y, made again, in given.saved.y.
BackwardCall run_in_parts(const Call& call, at::TensorList checkpoints, int64_t every, GradientMask wanted,
                          ResultGradients& given) {
  ForwardCall forward = prepare_forward(call, /*save=*/false);
  ForwardParams& f = forward.params;
  forward.y = empty_inside(forward.y, forward.y.sizes());
  f.y = data_or_null(forward.y);
  const CellTraits traits = traits_of(f.cell);
  const std::vector<Tensor> expected = empty_checkpoints(call, forward, every);
  TORCH_CHECK_VALUE(checkpoints.size() == expected.size(), "checkpoints: expected ", expected.size(),
                    " tensors of forward, got ", checkpoints.size());
  std::vector<Tensor> here;
  for (size_t i = 0; i < checkpoints.size(); ++i) {
    check_tensor("checkpoints", checkpoints[i], expected[i].sizes(), call.like(), expected[i].scalar_type());
    here.push_back(checkpoints[i].contiguous());
  }
  given.saved.y = forward.y;
  BackwardCall made = prepare_backward(call, given, wanted);
  BackwardParams& p = made.params;
  if (p.seq.B == 0) return made;
  if (!(wanted.states && call.h0())) p.d_h0 = nullptr;
  if (call.has_ids()) gather_input_product(call, forward);
  if (here[0].numel() > 0) cpu::put_outputs(f, every, here[0].const_data_ptr());
  const int64_t most = std::min(every, p.seq.T) * p.seq.B;  // rows of a range
  Tensor gates, cs, before;
  if (saves_gates(f.cell, call.rows.options.any())) gates = empty_inside(call.like(), {f.D, most, slot_count(f.cell), f.H});
  if (traits.has_c) cs = empty_inside(call.like(), {f.D, most, f.H}), before = empty_like(call.like(), {f.D, p.seq.B, f.H});
  f.gates = data_or_null(gates), f.cs = data_or_null(cs);
  f.training = true;
  p.gates = f.gates, p.cs = f.cs;
  cpu::ForwardPart range;
  range.every = every;
  range.c = here.size() > 1 ? data_or_null(here[1]) : nullptr;
  range.again = true;
  range.c_before = data_or_null(before);
  Workspace of_forward, of_backward;
  const auto again = [&](int64_t first, int64_t end) {
    range.first = first, range.end = end;
    range.saved = cpu::rows_of_steps(p.seq, p.D, first, end);
    cpu::forward_part(f, range, [&](int64_t bytes) { return of_forward.take(bytes); });
    return range.saved;
  };
  cpu::backward_in_parts(p, {every, range.c_before, again}, [&](int64_t bytes) { return of_backward.take(bytes); });
  return made;
}

LayerGradients layer_checkpointed_backward_cpu(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                               at::TensorList states, at::TensorList params, at::TensorList rows,
                                               at::TensorList checkpoints, at::IntArrayRef recipe_and_every,
                                               std::array<bool, 3> mask) {
  const int64_t every = every_of(recipe_and_every), recipe = recipe_and_every[0];
  const Rows given_rows = rows_of(rows, recipe);
  const Call call{x, states, params, given_rows, layer_recipe_of(recipe)};
  if (check_layer(call).projection) {
    // The gradient of W_hr reads gates and c of all steps: all of them are made again.
    const auto [y, last, saved] = call_layer(call, /*save=*/true);
    std::vector<Tensor> all = saved;
    if (call.recipe.all_states) all.push_back(last.back());
    all.push_back(y);
    return layer_backward_op().call(dy, dlast, x, states, params, rows, all, recipe, mask);
  }
  ResultGradients given{dy, gradients_of_last(call.recipe, dlast), {}};
  const GradientMask wanted{mask[0], mask[1], mask[2]};
  const BackwardCall made = run_in_parts(call, checkpoints, every, wanted, given);
  return gradients_of_layer(call, given, made, wanted);
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "layer_checkpointed(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, int[] recipe_and_every) "
      "-> (Tensor y, Tensor[] last, Tensor[] checkpoints)");
  m.def(
      "layer_checkpointed_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] checkpoints, int[] recipe_and_every, bool[3] mask) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("layer_checkpointed", fused_rnn::layer_checkpointed_cpu);
  m.impl("layer_checkpointed_backward", fused_rnn::layer_checkpointed_backward_cpu);
}
