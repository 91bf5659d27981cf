// One layer of a cell that is a formula (fused_rnn/formula), on a CPU or a GPU: the ops formula and formula_backward. Fake
// kernels and autograd are in fused_rnn/formula/ops.py, its derivatives in double_backward.py.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "torch/device.h"
#include "torch/formula_calls.h"
#include "torch/ids.h"
#include "torch/workspace.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/formula_device.h"
#include "torch/ops_cuda.h"
#endif

namespace fused_rnn {
namespace {

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

LayerOutputs formula_on(const Tensor& input, at::TensorList states, at::TensorList params, at::TensorList rows,
                        std::string_view cell, int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(input);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{input, states, params, given, formula_recipe_of(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  FormulaForwardCall made = prepare_formula(layer, flags & kFormulaSave);
  if (layer.shapes.B > 0) {
#ifdef FUSED_RNN_WITH_CUDA
    if (is_on_device(call.like())) {
      formula_forward_on_device(std::string(cell), made.params, call.like(), [&] { return input_products(layer); });
      return {std::move(made.y), std::move(made.last), std::move(made.saved)};
    }
#endif
    if (call.has_ids()) gather_input_products(layer, made);
    Workspace workspace;
    cpu::forward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return {std::move(made.y), std::move(made.last), std::move(made.saved)};
}

// What forward kept for backward, its output last, to p and to made.
void take_saved(FormulaBackwardCall& call, const FormulaLayer& layer, at::TensorList saved) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = layer.call.like();
  const auto dtype = x.scalar_type();
  const bool all_states = layer.call.recipe.all_states;
  const auto has_series = [&](int i) { return all_states ? i != traits.output : layer.keeps(i); };
  size_t expected = 1 + (traits.saved > 0) + static_cast<size_t>(traits.phases);
  for (int i = 0; i < traits.states; ++i) expected += has_series(i);
  TORCH_CHECK_VALUE(saved.size() == expected, "saved: expected ", expected, " tensors of forward, its output last, got ",
                    saved.size());
  cpu::FormulaBackward& p = call.params;
  FormulaGradients& made = call.made;
  size_t next = 0;
  if (traits.saved > 0) {
    check_tensor("saved", saved[next], {s.D, s.N, traits.saved, s.H}, x, dtype);
    p.saved = call.copies.contiguous(saved[next++]);
  }
  const auto take_series = [&] {
    for (int i = 0; i < traits.states; ++i) {
      if (!has_series(i)) continue;
      check_tensor("saved", saved[next], {s.N, s.D * s.H}, x, dtype);
      made.series[i] = saved[next];
      p.series[i] = call.copies.contiguous(saved[next++]);
    }
  };
  if (!all_states) take_series();
  for (int k = 0; k < traits.phases; ++k) {
    check_tensor("saved", saved[next], {s.D, s.N, s.H}, x, dtype);
    made.v.push_back(saved[next]);
    p.v[k] = call.copies.contiguous(saved[next++]);
  }
  if (all_states) take_series();  // they are results, not among what forward saved
  check_tensor("y", saved[next], s.output(layer.call), x, dtype);
  made.series[traits.output] = saved[next];
  p.y = call.copies.contiguous(saved[next]);
}

LayerGradients formula_backward_on(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                   at::TensorList params, at::TensorList rows, at::TensorList saved, std::string_view cell,
                                   int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(x);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, formula_recipe_of(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const bool adds = flags & kFormulaAddsProducts;
  TORCH_CHECK_VALUE(!adds || !dlast.empty(), "dlast: expected gradients of products as its last, got none");
  FormulaBackwardCall made =
      prepare_formula_backward(layer, dy, dlast.slice(0, dlast.size() - adds), flags & kFormulaGradStates);
  if (adds) add_gradients_of_products(made, layer, dlast.back());
  take_saved(made, layer, saved);
  if (layer.shapes.B > 0) {
#ifdef FUSED_RNN_WITH_CUDA
    if (is_on_device(call.like())) {
      formula_backward_on_device(std::string(cell), made.params, call.like());
      return gradients_of_formula(layer, made.made, flags);
    }
#endif
    Workspace workspace;
    cpu::backward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return gradients_of_formula(layer, made.made, flags);
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
