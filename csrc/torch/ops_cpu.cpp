// The layer op on CPU tensors, and the way around the dispatcher for calls that concern nothing else.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include "cpu/cpu.h"
#include "torch/backward_ops.h"
#include "torch/ids.h"
#include "torch/ops.h"
#include "torch/second_order.h"
#include "torch/second_order_ops.h"
#include "torch/weight_node.h"
#include "torch/workspace.h"

namespace fused_rnn {
namespace {

void run_forward(const Call& call, ForwardCall& made) {
  if (made.params.seq.B == 0) return;
  if (call.has_ids()) gather_input_product(call, made);
  Workspace workspace;
  cpu::forward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
}

LayerOutputs layer_cpu(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows, int64_t recipe,
                       bool save) {
  const Rows given = rows_of(rows, recipe);
  const Call call{x, states, params, given, layer_recipe_of(recipe)};
  ForwardCall made = prepare_forward(call, save);
  run_forward(call, made);
  return forward_outputs(made, save);
}

BackwardCall run_backward(const Call& call, const ResultGradients& given, GradientMask wanted) {
  BackwardCall made = prepare_backward(call, given, wanted);
  if (made.params.seq.B > 0) {
    if (!(wanted.states && call.h0())) made.params.d_h0 = nullptr;  // one product less
    Workspace workspace;
    cpu::backward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return made;
}

// The scans of second_order.cpp.
void run_tangents(const Call&, ForwardCall& made) {
  Workspace workspace;
  cpu::forward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
}
void run_dual_backward(const Call&, DualBackwardParams& params) {
  Workspace workspace;
  cpu::dual_backward(params, [&](int64_t bytes) { return workspace.take(bytes); });
}

struct OnCpu {
  template <class F>
  static auto run_backward(const Call& call, const ResultGradients& given, GradientMask wanted, const F& f) {
    return f(fused_rnn::run_backward(call, given, wanted));
  }
};

}  // namespace

bool runs_plainly_on_cpu(const Call& call) {
  if (!nothing_intercepts() || at::hasCallbacks()) return false;
  const auto plain = [](const Tensor& t) { return t.is_cpu() && is_plain(t); };
  return plain(call.x) && std::all_of(call.states.begin(), call.states.end(), plain) &&
         std::all_of(call.params.begin(), call.params.end(), plain);
}

LayerGradients step_backward_on_cpu(const Call& call, const ResultGradients& given, GradientMask mask, WeightNode& weights) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const BackwardCall made = run_backward(call, given, mask);
  const LayerShapes& s = made.shapes;
  weights.add({call.x.reshape({s.N, s.I}), call.h0() ? call.h0()->reshape({s.N, s.H}) : Tensor(),
               made.d_gates.view({s.N, slot_count(call.recipe.cell) * s.H})});
  mask.weights = false;
  return gradients_of_layer(call, given, made, mask);
}

const SecondOrderScans& second_order_on_cpu() {
  static constexpr SecondOrderScans scans{[](const Tensor&, c10::function_ref<void()> f) { f(); }, run_tangents,
                                          run_dual_backward, [](const Tensor&) { return true; }};
  return scans;
}

std::pair<LayerGradients, Tensor> backward_keeping_dh(const Call& call, const ResultGradients& given, GradientMask mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  BackwardCall made = prepare_backward(call, given, mask);
  const LayerShapes& s = made.shapes;
  const Tensor dh = empty_inside(call.x, {s.D, s.N, s.H});
  made.params.d_h = data_or_null(dh);
  if (!(mask.states && call.h0())) made.params.d_h0 = nullptr;  // one product less
  Workspace workspace;
  if (s.B > 0) cpu::backward(made.params, [&](int64_t bytes) { return workspace.take(bytes); });
  return {gradients_of_layer(call, given, made, mask), dh};
}

Results run_on_cpu(const Call& call) {
  if (differentiates(call)) return run_composite(call);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto layer = [](const Call& one) {
    ForwardCall made = prepare_forward(one, /*save=*/false);
    run_forward(one, made);
    return Results{std::move(made.y), made.last()};
  };
  const bool one_layer = call.recipe.num_layers == 1 && !call.recipe.batch_first && !call.recipe.all_states;
  return one_layer ? layer(call) : run_stack(call, layer);
}

}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("layer", fused_rnn::layer_cpu);
  m.impl("layer_backward", fused_rnn::BackwardOps<fused_rnn::OnCpu>::layer);
  m.impl("layer_backward_samples", fused_rnn::BackwardOps<fused_rnn::OnCpu>::samples);
  m.impl("layer_backward_gates", fused_rnn::BackwardOps<fused_rnn::OnCpu>::gates);
  m.impl("layer_second_order", fused_rnn::layer_second_order);
  m.impl("layer_jvp", fused_rnn::layer_jvp);
}
