// A layer of a formula whose backward runs forward again between states that are kept every k steps (FormulaPart): the ops
// formula_checkpointed and its backward, on a CPU. Fake kernels, autograd and what calls them are in
// fused_rnn/formula/checkpoint.py.
//
// kept: all states before every k-th step [D, K, states, B, H], float where the dtype has 16 bits, so that no state is
// rounded on its way. What backward holds of all steps while it runs is y, the states and what phases took, made again, and
// the gradients of the products: all rows together give the gradients of the weights, in the order of a layer that keeps
// everything.
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "torch/formula_calls.h"
#include "torch/workspace.h"

namespace fused_rnn {
namespace {

// k, of the ops' argument [flags, k].
int64_t every_of_formula(at::IntArrayRef call) {
  TORCH_CHECK_VALUE(call.size() == 2 && call[1] >= 1, "flags_and_every: expected flags and a number of at least 1, got ",
                    call);
  return call[1];
}

Tensor empty_kept(const FormulaLayer& layer, int64_t every) {
  const LayerShapes& s = layer.shapes;
  const Tensor& x = layer.call.like();
  const int64_t count = s.T > 0 ? (s.T - 1) / every : 0;
  return at::empty({s.D, count, layer.traits().states, s.B, s.H},
                   x.options().dtype(at::toOpMathType(x.scalar_type())).requires_grad(false));
}

LayerOutputs formula_checkpointed_cpu(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                                      std::string_view cell, at::IntArrayRef flags_and_every) {
  const int64_t every = every_of_formula(flags_and_every), flags = flags_and_every[0];
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, formula_recipe_of(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  FormulaForwardCall made = prepare_formula(layer, /*save=*/false);
  Tensor kept = empty_kept(layer, every);
  if (layer.shapes.B > 0) {
    if (call.has_ids()) gather_input_products(layer, made);
    cpu::FormulaPart part;
    part.every = every;
    part.kept = data_or_null(kept);
    Workspace workspace;
    cpu::forward_part(made.params, part, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return {std::move(made.y), std::move(made.last), {std::move(kept)}};
}

// What a range's forward leaves for backward: y, series and v of all steps, saved values of the range.
void share_memory(const FormulaLayer& layer, int64_t every, FormulaForwardCall& forward, FormulaBackwardCall& backward) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = layer.call.like();
  cpu::FormulaForward& f = forward.params;
  cpu::FormulaBackward& p = backward.params;
  FormulaGradients& made = backward.made;
  f.training = true;
  for (int i = 0; i < traits.states; ++i) {
    if (i != traits.output && !layer.keeps(i)) continue;
    made.series[i] = empty_inside(x, {s.N, s.D * s.H});
    if (i == traits.output) continue;
    p.series[i] = f.series[i] = data_or_null(made.series[i]);
  }
  made.series[traits.output] = made.series[traits.output].view(s.output(layer.call));
  p.y = f.y = data_or_null(made.series[traits.output]);
  for (int k = 0; k < traits.phases; ++k) {
    made.v.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.v[k] = f.v[k] = data_or_null(made.v.back());
  }
  const int64_t most = std::min(every, s.T) * s.B;  // rows of a range
  forward.saved = {empty_inside(x, {s.D, most, traits.saved, s.H})};
  p.saved = f.saved = data_or_null(forward.saved[0]);
}

LayerGradients formula_checkpointed_backward_cpu(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                                 at::TensorList states, at::TensorList params, at::TensorList rows,
                                                 at::TensorList kept, std::string_view cell,
                                                 at::IntArrayRef flags_and_every) {
  const int64_t every = every_of_formula(flags_and_every), flags = flags_and_every[0];
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, formula_recipe_of(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const LayerShapes& s = layer.shapes;
  const Tensor expected = empty_kept(layer, every);
  TORCH_CHECK_VALUE(kept.size() == 1, "kept: expected 1 tensor of forward, got ", kept.size());
  check_tensor("kept", kept[0], expected.sizes(), call.like(), expected.scalar_type());
  FormulaBackwardCall made = prepare_formula_backward(layer, dy, dlast, flags & kFormulaGradStates);
  FormulaForwardCall forward = formula_inputs(layer);
  share_memory(layer, every, forward, made);
  if (s.B == 0) return gradients_of_formula(layer, made.made, flags);
  if (call.has_ids()) gather_input_products(layer, forward);
  const Tensor states_kept = kept[0].contiguous();
  cpu::FormulaPart range;
  range.every = every;
  range.kept = states_kept.numel() > 0 ? states_kept.data_ptr() : nullptr;
  range.again = true;
  Workspace of_forward, of_backward;
  const auto again = [&](int64_t first, int64_t end) {
    range.first = first, range.end = end;
    range.saved = cpu::rows_of_steps(forward.params.seq, s.D, first, end);
    cpu::forward_part(forward.params, range, [&](int64_t bytes) { return of_forward.take(bytes); });
    return range.saved;
  };
  cpu::backward_in_parts(made.params, {every, nullptr, again}, [&](int64_t bytes) { return of_backward.take(bytes); });
  return gradients_of_formula(layer, made.made, flags);
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "formula_checkpointed(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, str cell, int[] flags_and_every) "
      "-> (Tensor y, Tensor[] last, Tensor[] kept)");
  m.def(
      "formula_checkpointed_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] kept, str cell, int[] flags_and_every) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("formula_checkpointed", fused_rnn::formula_checkpointed_cpu);
  m.impl("formula_checkpointed_backward", fused_rnn::formula_checkpointed_backward_cpu);
}
