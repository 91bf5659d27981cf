#include "torch/formula_calls.h"

#include <ATen/ops/where.h>

#include "torch/ids.h"

namespace fused_rnn {
namespace {

// The gradients of states after each step, which follow those of the last states in dlast.
void fill_gradients_of_series(cpu::FormulaBackward& p, const FormulaLayer& layer, at::TensorList dlast, Copies& copies) {
  const LayerShapes& s = layer.shapes;
  const Tensor& x = layer.call.like();
  auto next = static_cast<size_t>(layer.traits().states);
  for (int i = 0; i < layer.traits().states && next < dlast.size(); ++i) {
    if (i == layer.traits().output) continue;
    const Tensor& d = dlast[next++];
    if (d.dim() == 1 && d.numel() == 0) continue;
    check_tensor("dlast", d, {s.N, s.D * s.H}, x, x.scalar_type());
    p.d_series[i] = copies.contiguous(d);
  }
}

}  // namespace

void add_gradients_of_products(FormulaBackwardCall& made, const FormulaLayer& layer, const Tensor& added) {
  const LayerShapes& s = layer.shapes;
  const Tensor& x = layer.call.like();
  TORCH_CHECK_VALUE(x.is_cpu(), "flags: expected no gradients of products from elsewhere on ", x.device());
  TORCH_CHECK_VALUE(added.dim() == 4 && added.size(2) >= layer.traits().gradients,
                    "dlast: expected gradients of products [D, N, S, H] with S at least ", layer.traits().gradients,
                    ", got ", added.sizes());
  check_tensor("dlast", added, {s.D, s.N, added.size(2), s.H}, x, x.scalar_type());
  made.params.d_added = made.copies.contiguous(added);
  made.params.added_blocks = added.size(2);
}

Recipe formula_recipe_of(int64_t flags) {
  Recipe recipe;
  recipe.has_biases = flags & kFormulaBiases;
  recipe.bidirectional = flags & kFormulaBidirectional;
  recipe.all_states = flags & kFormulaAllStates;
  return recipe;
}

FormulaForwardCall formula_inputs(const FormulaLayer& layer) {
  const Call& call = layer.call;
  FormulaForwardCall made;
  fill(made.params, layer, made.copies);
  if (!call.has_ids()) made.params.x = made.copies.contiguous(call.x);
  if (call.rows.options.values) made.params.given = made.copies.contiguous(*call.rows.options.values);
  return made;
}

FormulaForwardCall prepare_formula(const FormulaLayer& layer, bool save) {
  const Call& call = layer.call;
  const Tensor& x = call.like();
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  FormulaForwardCall made = formula_inputs(layer);
  cpu::FormulaForward& p = made.params;
  p.training = save;
  made.y = empty_like(x, s.output(call));
  p.y = data_or_null(made.y);
  for (int i = 0; i < traits.states; ++i) {
    made.last.push_back(empty_like(x, {s.D, s.B, s.H}));
    p.last[i] = data_or_null(made.last.back());
  }
  for (int i = 0; call.recipe.all_states && i < traits.states; ++i) {
    if (i == traits.output) continue;
    made.last.push_back(empty_like(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(made.last.back());
  }
  if (save && traits.saved > 0) {
    made.saved.push_back(empty_inside(x, {s.D, s.N, traits.saved, s.H}));
    p.saved = data_or_null(made.saved.back());
  }
  for (int i = 0; save && i < traits.states; ++i) {
    if (!layer.keeps(i) || call.recipe.all_states) continue;
    made.saved.push_back(empty_inside(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(made.saved.back());
  }
  for (int k = 0; save && k < traits.phases; ++k) {
    made.saved.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.v[k] = data_or_null(made.saved.back());
  }
  return made;
}

void gather_input_products(const FormulaLayer& layer, FormulaForwardCall& made) {
  const LayerShapes& s = layer.shapes;
  const Tensor ids = ids_of_rows(layer.call, s);
  made.columns = empty_inside(layer.call.like(), {s.D, s.N, layer.input_gates() * s.H});
  for (int d = 0; d < s.D; ++d) gather_columns_into(made.columns.select(0, d), layer.call.params_of_direction(d)[0], ids);
  made.params.columns = made.columns.const_data_ptr();
}

FormulaBackwardCall prepare_formula_backward(const FormulaLayer& layer, const OptionalTensor& dy, at::TensorList dlast,
                                             bool wants_states) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = call.like();
  const auto dtype = x.scalar_type();
  const auto results = static_cast<size_t>(call.recipe.all_states ? 2 * traits.states - 1 : traits.states);
  TORCH_CHECK_VALUE(dlast.empty() || dlast.size() == results, "dlast: expected ", results,
                    " gradients ([0]: none), or no list of them, got ", dlast.size());
  FormulaBackwardCall made_call;
  cpu::FormulaBackward& p = made_call.params;
  FormulaGradients& made = made_call.made;
  Copies& copies = made_call.copies;
  fill(p, layer, copies);
  made.series.resize(traits.states);
  check_optional("dy", dy, s.output(call), x, dtype);
  p.dy = copies.contiguous(dy);
  made.d = empty_inside(x, {s.D, s.N, traits.gradients + traits.parameters + traits.phases, s.H});
  p.d = data_or_null(made.d);
  for (int i = 0; i < traits.states; ++i) {
    const bool given = !dlast.empty() && !(dlast[i].dim() == 1 && dlast[i].numel() == 0);
    if (given) check_tensor("dlast", dlast[i], {s.D, s.B, s.H}, x, dtype);
    p.d_last[i] = given ? copies.contiguous(dlast[i]) : nullptr;
    made.d_states.push_back(wants_states && !call.states.empty() ? empty_like(x, {s.D, s.B, s.H}) : Tensor());
    p.d_states[i] = data_or_null(made.d_states.back());
  }
  fill_gradients_of_series(p, layer, dlast, copies);
  for (size_t i = 0; wants_states && i < call.rows.reset_states.size(); ++i) {
    made.d_reset.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.d_reset[i] = data_or_null(made.d_reset.back());
  }
  return made_call;
}

LayerGradients gradients_of_formula(const FormulaLayer& layer, FormulaGradients& made, int64_t flags) {
  const Call& call = layer.call;
  const bool wants_states = flags & kFormulaGradStates;
  const auto none = [&] { return empty_like(call.like(), {0}); };
  TORCH_CHECK_VALUE(!(call.has_ids() && flags & kFormulaGradX), "flags: expected no gradient of an input of ids");
  std::vector<Tensor> d_states, d_params;
  for (size_t i = 0; i < call.states.size(); ++i) d_states.push_back(wants_states ? made.d_states[i] : none());
  if (wants_states && !call.rows.reset_states.empty()) {
    reset_state_gradients(layer, made, d_states);
  } else {
    for (size_t i = 0; i < call.rows.reset_states.size(); ++i) d_states.push_back(none());
  }
  if (flags & kFormulaGradValues) d_states.push_back(values_gradient(layer, made));
  const RowChoice chosen(call, layer.shapes);
  made.d = chosen.of(made.d, 1);
  for (Tensor& v : made.v) v = chosen.of(v, 1);
  if (flags & kFormulaGradParams) {
    Tensor rows_of_x = chosen.of(call.has_ids() ? ids_of_rows(call, layer.shapes)
                                                : call.x.contiguous().view({layer.shapes.N, layer.shapes.I}));
    // The d of padding is 0, but its x may hold anything, and 0 * NaN is not 0.
    if (!call.has_ids() && chosen.all() && has_padding(call, layer.shapes)) {
      rows_of_x = at::where(active_rows(call, layer.shapes), rows_of_x, 0);
    }
    for (int k = 0; k < layer.shapes.D; ++k) direction_gradients(layer, made, chosen, rows_of_x, k, d_params);
  } else {
    for (size_t i = 0; i < call.params.size(); ++i) d_params.push_back(none());
  }
  return {flags & kFormulaGradX ? input_gradient(layer, made, chosen) : none(), std::move(d_states), std::move(d_params)};
}

}  // namespace fused_rnn
