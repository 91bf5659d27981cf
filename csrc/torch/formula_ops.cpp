// One layer of a cell that is a formula (fused_rnn/formula), on a CPU or a GPU: the ops formula and formula_backward. Fake
// kernels, autograd and the double backward are in fused_rnn/formula/ops.py.
#include "torch/formula_ops.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch/device.h"
#include "torch/formula_layer.h"
#include "torch/ids.h"
#include "torch/workspace.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/formula_device.h"
#include "torch/ops_cuda.h"
#endif

namespace fused_rnn {
namespace {

Recipe recipe_of_flags(int64_t flags) {
  Recipe recipe;
  recipe.has_biases = flags & kFormulaBiases;
  recipe.bidirectional = flags & kFormulaBidirectional;
  recipe.all_states = flags & kFormulaAllStates;
  return recipe;
}

#ifdef FUSED_RNN_WITH_CUDA
// What holds during an op on CUDA tensors: their device is the current one, and matrix products are as exact as the kernels,
// which do not round float32 to TF32.
struct DeviceBlock {
  std::optional<c10::DeviceGuard> device;
  std::optional<MatmulPrecision> precision;

  explicit DeviceBlock(const Tensor& x) {
    if (!is_on_device(x)) return;
    device.emplace(x.device());
    precision.emplace(/*allow_tf32=*/false);
  }
};

// x W_ih^T + b_ih of all directions [D, N, Gi * H], then the values that are given.
Tensor input_products(const FormulaLayer& layer) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  const Tensor x = call.has_ids() ? ids_of_rows(call, s) : call.x.reshape({s.N, s.I});
  const Tensor products = empty_inside(call.like(), {s.D, s.N, layer.traits().input_gates * s.H});
  for (int d = 0; d < s.D; ++d) {
    const at::TensorList w = call.params_of_direction(d);
    const int64_t own = layer.input_gates() * s.H;
    Tensor out = products.select(0, d).slice(1, 0, own);
    if (const OptionalTensor& values = call.rows.options.values) {
      products.select(0, d).slice(1, own).copy_(values->select(0, d).flatten(1));
    }
    if (call.has_ids()) {
      gather_columns_into(out, w[0], x);
      if (call.recipe.has_biases) out.add_(w[layer.first_bias()]);
      continue;
    }
    if (call.recipe.has_biases) {
      at::addmm_out(out, w[layer.first_bias()], x, w[0].t());
    } else {
      at::mm_out(out, x, w[0].t());
    }
  }
  return products;
}
#endif

// The input products of ids on a CPU, for the scan to read.
Tensor gather_input_products(const FormulaLayer& layer, cpu::FormulaForward& p) {
  const LayerShapes& s = layer.shapes;
  const Tensor ids = ids_of_rows(layer.call, s);
  const Tensor columns = empty_inside(layer.call.like(), {s.D, s.N, layer.input_gates() * s.H});
  for (int d = 0; d < s.D; ++d) gather_columns_into(columns.select(0, d), layer.call.params_of_direction(d)[0], ids);
  p.columns = columns.const_data_ptr();
  return columns;
}

LayerOutputs formula_on(const Tensor& input, at::TensorList states, at::TensorList params, at::TensorList rows,
                        std::string_view cell, int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(input);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{input, states, params, given, recipe_of_flags(flags)};
  const Tensor& x = call.like();
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  cpu::FormulaForward p{};
  Copies copies;
  fill(p, layer, copies);
  if (!call.has_ids()) p.x = copies.contiguous(input);
  if (call.rows.options.values) p.given = copies.contiguous(*call.rows.options.values);
  p.training = flags & kFormulaSave;
  Tensor y = empty_like(x, s.output(call));
  p.y = data_or_null(y);
  std::vector<Tensor> last, saved;
  for (int i = 0; i < traits.states; ++i) {
    last.push_back(empty_like(x, {s.D, s.B, s.H}));
    p.last[i] = data_or_null(last.back());
  }
  for (int i = 0; call.recipe.all_states && i < traits.states; ++i) {
    if (i == traits.output) continue;
    last.push_back(empty_like(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(last.back());
  }
  if (p.training && traits.saved > 0) {
    saved.push_back(empty_inside(x, {s.D, s.N, traits.saved, s.H}));
    p.saved = data_or_null(saved.back());
  }
  for (int i = 0; p.training && i < traits.states; ++i) {
    if (!layer.keeps(i) || call.recipe.all_states) continue;
    saved.push_back(empty_inside(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(saved.back());
  }
  for (int k = 0; p.training && k < traits.phases; ++k) {
    saved.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.v[k] = data_or_null(saved.back());
  }
  if (s.B == 0) return {std::move(y), std::move(last), std::move(saved)};
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
    formula_forward_on_device(std::string(cell), p, x, [&] { return input_products(layer); });
    return {std::move(y), std::move(last), std::move(saved)};
  }
#endif
  Tensor columns;
  if (call.has_ids()) columns = gather_input_products(layer, p);
  Workspace workspace;
  cpu::forward(p, [&](int64_t bytes) { return workspace.take(bytes); });
  return {std::move(y), std::move(last), std::move(saved)};
}

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

FormulaGradients run_backward(const FormulaLayer& layer, [[maybe_unused]] const std::string& cell, const OptionalTensor& dy,
                              at::TensorList dlast, at::TensorList saved, bool wants_states) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = call.like();
  const auto dtype = x.scalar_type();
  const bool all_states = call.recipe.all_states;
  const auto has_series = [&](int i) { return all_states ? i != traits.output : layer.keeps(i); };
  size_t expected = 1 + (traits.saved > 0) + static_cast<size_t>(traits.phases);
  for (int i = 0; i < traits.states; ++i) expected += has_series(i);
  const auto results = static_cast<size_t>(all_states ? 2 * traits.states - 1 : traits.states);
  TORCH_CHECK_VALUE(saved.size() == expected, "saved: expected ", expected, " tensors of forward, its output last, got ",
                    saved.size());
  TORCH_CHECK_VALUE(dlast.empty() || dlast.size() == results, "dlast: expected ", results,
                    " gradients ([0]: none), or no list of them, got ", dlast.size());
  cpu::FormulaBackward p{};
  Copies copies;
  fill(p, layer, copies);
  FormulaGradients made;
  made.series.resize(traits.states);
  size_t next = 0;
  if (traits.saved > 0) {
    check_tensor("saved", saved[next], {s.D, s.N, traits.saved, s.H}, x, dtype);
    p.saved = copies.contiguous(saved[next++]);
  }
  const auto take_series = [&] {
    for (int i = 0; i < traits.states; ++i) {
      if (!has_series(i)) continue;
      check_tensor("saved", saved[next], {s.N, s.D * s.H}, x, dtype);
      made.series[i] = saved[next];
      p.series[i] = copies.contiguous(saved[next++]);
    }
  };
  if (!all_states) take_series();
  for (int k = 0; k < traits.phases; ++k) {
    check_tensor("saved", saved[next], {s.D, s.N, s.H}, x, dtype);
    made.v.push_back(saved[next]);
    p.v[k] = copies.contiguous(saved[next++]);
  }
  if (all_states) take_series();  // they are results, not among what forward saved
  check_tensor("y", saved[next], s.output(call), x, dtype);
  made.series[traits.output] = saved[next];
  p.y = copies.contiguous(saved[next]);
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
  if (s.B == 0) return made;
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
    formula_backward_on_device(cell, p, x);
    return made;
  }
#endif
  Workspace workspace;
  cpu::backward(p, [&](int64_t bytes) { return workspace.take(bytes); });
  return made;
}

LayerGradients formula_backward_on(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                   at::TensorList params, at::TensorList rows, at::TensorList saved, std::string_view cell,
                                   int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(x);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, recipe_of_flags(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const bool wants_states = flags & kFormulaGradStates;
  FormulaGradients made = run_backward(layer, std::string(cell), dy, dlast, saved, wants_states);
  const auto none = [&] { return empty_like(call.like(), {0}); };
  TORCH_CHECK_VALUE(!(call.has_ids() && flags & kFormulaGradX), "flags: expected no gradient of an input of ids");
  std::vector<Tensor> d_states, d_params;
  for (size_t i = 0; i < states.size(); ++i) d_states.push_back(wants_states ? made.d_states[i] : none());
  if (wants_states && !given.reset_states.empty()) {
    reset_state_gradients(layer, made, d_states);
  } else {
    for (size_t i = 0; i < given.reset_states.size(); ++i) d_states.push_back(none());
  }
  const RowChoice chosen(call, layer.shapes);
  made.d = chosen.of(made.d, 1);
  for (Tensor& v : made.v) v = chosen.of(v, 1);
  if (flags & kFormulaGradParams) {
    Tensor rows_of_x =
        chosen.of(call.has_ids() ? ids_of_rows(call, layer.shapes) : x.contiguous().view({layer.shapes.N, layer.shapes.I}));
    // The d of padding is 0, but its x may hold anything, and 0 * NaN is not 0.
    if (!call.has_ids() && chosen.all() && has_padding(call, layer.shapes)) {
      rows_of_x = at::where(active_rows(call, layer.shapes), rows_of_x, 0);
    }
    for (int k = 0; k < layer.shapes.D; ++k) direction_gradients(layer, made, chosen, rows_of_x, k, d_params);
  } else {
    for (size_t i = 0; i < params.size(); ++i) d_params.push_back(none());
  }
  return {flags & kFormulaGradX ? input_gradient(layer, made, chosen) : none(), std::move(d_states), std::move(d_params)};
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "formula(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, str cell, int flags) "
      "-> (Tensor y, Tensor[] last, Tensor[] saved)");
  m.def(
      "formula_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, str cell, int flags) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("formula", fused_rnn::formula_on);
  m.impl("formula_backward", fused_rnn::formula_backward_on);
}

#ifdef FUSED_RNN_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
  m.impl("formula", fused_rnn::formula_on);
  m.impl("formula_backward", fused_rnn::formula_backward_on);
}
#endif
