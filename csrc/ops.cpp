// The ops of the library: schemas, the CPU kernels' registration, autograd, and the composites (stack, cell) above the layer.
// CUDA kernels are registered in ops_cuda.cpp, autocast in ops_autocast.cpp, fake kernels and the differentiable form of
// backward in fused_rnn/_ops.py.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include "autograd.h"
#include "cpu/cpu.h"
#include "layer.h"
#include "workspace.h"

namespace fused_rnn {

namespace {

void run_forward(ForwardCall& call) {
  if (call.params.seq.B == 0) return;
  Workspace workspace;
  cpu::forward(call.params, [&](int64_t bytes) { return workspace.take(bytes); });
}

LayerOutputs layer_cpu(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                       bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                       const OptionalTensor& resets, int64_t cell, bool bidirectional, bool save) {
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, static_cast<CellKind>(cell), bidirectional};
  ForwardCall call = prepare_forward(in, save);
  run_forward(call);
  return forward_outputs(call, save);
}

LayerGradients layer_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                  const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                                  bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                                  const OptionalTensor& resets, const Tensor& y, const Tensor& gates, const Tensor& cs,
                                  int64_t cell, bool bidirectional, std::array<bool, 3> mask) {
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, static_cast<CellKind>(cell), bidirectional};
  const BackwardInputs grads{dy, dh_n, dc_n, y, gates, cs};
  BackwardCall call = prepare_backward(in, grads);
  if (call.params.seq.B > 0) {
    Workspace workspace;
    cpu::backward(call.params, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return gradients_of_layer(in, grads, call, {mask[0], mask[1], mask[2]});
}

auto& layer_op() {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::layer", "").typed<LayerSignature>();
  return op;
}
auto& layer_backward_op() {
  static auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::layer_backward", "").typed<LayerBackwardSignature>();
  return op;
}
auto& layer_backward_differentiable_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fused_rnn::layer_backward_differentiable", "")
                       .typed<LayerBackwardSignature>();
  return op;
}

// ---- autograd ----

class LayerFunction : public torch::autograd::Function<LayerFunction> {
  // What backward wants to know beside tensors, as bits: an entry of saved_data each would take longer than a small step.
  enum : int64_t { kBiases = 1, kBidirectional = 2, kNeedX = 4, kNeedState = 8, kNeedWeights = 16, kCellShift = 8 };

 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                                                const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                                                bool has_biases, const OptionalTensor& lengths,
                                                const OptionalTensor& offsets, const OptionalTensor& resets, int64_t cell,
                                                bool bidirectional) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, gates, cs] =
        layer_op().call(x, h0, c0, params, has_biases, lengths, offsets, resets, cell, bidirectional, /*save=*/true);
    torch::autograd::variable_list saved{
        x, tensor_of(h0), tensor_of(c0), tensor_of(lengths), tensor_of(offsets), tensor_of(resets), y, gates, cs};
    saved.insert(saved.end(), params.begin(), params.end());
    ctx->save_for_backward(std::move(saved));
    const bool need_state = requires_grad(h0) || requires_grad(c0);
    ctx->saved_data["call"] = (has_biases ? kBiases : 0) | (bidirectional ? kBidirectional : 0) |
                              (x.requires_grad() ? kNeedX : 0) | (need_state ? kNeedState : 0) |
                              (any_requires_grad(params) ? kNeedWeights : 0) | cell << kCellShift;
    torch::autograd::variable_list constant{gates, cs};
    if (static_cast<CellKind>(cell) != CellKind::kLstm) constant.push_back(c_n);
    ctx->mark_non_differentiable(constant);
    ctx->set_materialize_grads(false);
    return {y, h_n, c_n, gates, cs};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    constexpr size_t kFixed = 9;
    const at::TensorList params = at::TensorList(saved).slice(kFixed);
    const int64_t call = ctx->saved_data["call"].toInt(), cell = call >> kCellShift;
    const std::array<bool, 3> mask{(call & kNeedX) != 0, (call & kNeedState) != 0, (call & kNeedWeights) != 0};
    torch::autograd::variable_list result(3 + params.size() + 6);  // one for every argument of forward
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const bool lstm = static_cast<CellKind>(cell) == CellKind::kLstm;
    auto [dx, dh0, dc0, dparams] =
        layer_backward_op().call(optional_of(grads[0]), optional_of(grads[1]), lstm ? optional_of(grads[2]) : std::nullopt,
                                 saved[0], optional_of(saved[1]), optional_of(saved[2]), params, (call & kBiases) != 0,
                                 optional_of(saved[3]), optional_of(saved[4]), optional_of(saved[5]), saved[6], saved[7],
                                 saved[8], cell, (call & kBidirectional) != 0, mask);
    if (mask[0]) result[0] = dx;
    if (mask[1] && saved[1].defined()) result[1] = dh0;
    if (mask[1] && lstm && saved[2].defined()) result[2] = dc0;
    if (mask[2]) std::copy(dparams.begin(), dparams.end(), result.begin() + 3);
    return result;
  }
};

LayerOutputs layer_autograd(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                            bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                            const OptionalTensor& resets, int64_t cell, bool bidirectional, bool save) {
  // With tangents of forward-mode AD, which it lacks, LayerFunction raises.
  const auto has_tangent = [](const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); };
  const bool tangents = torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
                        (has_tangent(x) || (h0 && has_tangent(*h0)) || (c0 && has_tangent(*c0)) ||
                         std::any_of(params.begin(), params.end(), has_tangent));
  if (!differentiates(x, h0, c0, params) && !tangents) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_op().call(x, h0, c0, params, has_biases, lengths, offsets, resets, cell, bidirectional, save);
  }
  auto out = LayerFunction::apply(x, h0, c0, params, has_biases, lengths, offsets, resets, cell, bidirectional);
  if (save) return {out[0], out[1], out[2], out[3], out[4]};
  return {out[0], out[1], out[2], empty_like(x, {0}), empty_like(x, {0})};
}

// Inside backward with create_graph the gradients must be differentiable themselves: they are then made by the composite
// in fused_rnn/_ops.py, which runs the reference once more under autograd.
LayerGradients layer_backward_autograd(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                       const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                       at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                       const OptionalTensor& offsets, const OptionalTensor& resets, const Tensor& y,
                                       const Tensor& gates, const Tensor& cs, int64_t cell, bool bidirectional,
                                       std::array<bool, 3> mask) {
  const bool differentiate =
      at::GradMode::is_enabled() && (requires_grad(dy) || requires_grad(dh_n) || requires_grad(dc_n) || x.requires_grad() ||
                                     requires_grad(h0) || requires_grad(c0) || any_requires_grad(params));
  if (differentiate) {
    return layer_backward_differentiable_op().call(dy, dh_n, dc_n, x, h0, c0, params, has_biases, lengths, offsets, resets,
                                                   y, gates, cs, cell, bidirectional, mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_backward_op().call(dy, dh_n, dc_n, x, h0, c0, params, has_biases, lengths, offsets, resets, y, gates, cs,
                                  cell, bidirectional, mask);
}

// ---- composites ----

// A stack of layers, dropout between them. Shapes as torch.nn.LSTM's: input [T, B, I] or [B, T, I] or packed [N, I].
// layer(x, h0, c0, params, resets) -> (y, h_n, c_n).
template <class Layer>
std::tuple<Tensor, Tensor, Tensor> stack(const Layer& layer, const Tensor& input, const OptionalTensor& h0,
                                         const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& resets,
                                         int64_t num_layers, bool bidirectional, double dropout, bool training,
                                         bool batch_first) {
  TORCH_CHECK_VALUE(num_layers > 0 && weights.size() % num_layers == 0,
                    "weights: expected a multiple of num_layers=", num_layers, " tensors, got ", weights.size());
  const int64_t directions = bidirectional ? 2 : 1;
  const OptionalTensor layer_resets = batch_first && resets ? OptionalTensor(resets->transpose(0, 1)) : resets;
  Tensor y = batch_first ? input.transpose(0, 1) : input;
  std::vector<Tensor> h_n, c_n;
  for (int64_t l = 0; l < num_layers; ++l) {
    auto [out, h, c] =
        layer(y, states_of_layer(h0, l, directions, num_layers), states_of_layer(c0, l, directions, num_layers),
              params_of_layer(weights, l, num_layers), layer_resets);
    y = std::move(out);
    h_n.push_back(std::move(h));
    c_n.push_back(std::move(c));
    if (dropout > 0 && training && l + 1 < num_layers) y = at::dropout(y, dropout, /*train=*/true);
  }
  return {batch_first ? y.transpose(0, 1) : y, joined(h_n), joined(c_n)};
}

// Lengths or offsets on input's device.
OptionalTensor beside(const OptionalTensor& integers, const Tensor& input) {
  if (!integers || integers->device() == input.device()) return integers;
#ifdef FUSED_RNN_WITH_CUDA
  const bool from_host = input.is_cuda() && integers->is_cpu() && integers->scalar_type() == at::kLong;
  if (from_host && nothing_intercepts() && is_plain(input) && is_plain(*integers)) return on_cuda(*integers, input);
#endif
  return integers->to(input.device());
}

std::tuple<Tensor, Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                       at::TensorList weights, const OptionalTensor& given_lengths,
                                       const OptionalTensor& given_offsets, const OptionalTensor& resets, int64_t cell,
                                       int64_t num_layers, bool has_biases, bool bidirectional, double dropout,
                                       bool training, bool batch_first) {
  const OptionalTensor lengths = beside(given_lengths, input), offsets = beside(given_offsets, input);
#ifdef FUSED_RNN_WITH_CUDA
  const OptionalTensor host_offsets = given_offsets && given_offsets->is_cpu() ? given_offsets : std::nullopt;
  if (auto results = overlapped_rnn(input, h0, c0, weights, lengths, offsets, host_offsets, resets, cell, num_layers,
                                    has_biases, bidirectional, dropout, training, batch_first)) {
    return *std::move(results);
  }
#endif
  const auto layer = [&](const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                         const OptionalTensor& layer_resets) {
    auto [y, h_n, c_n, gates, cs] =
        layer_op().call(x, h, c, params, has_biases, lengths, offsets, layer_resets, cell, bidirectional, /*save=*/false);
    return std::tuple(std::move(y), std::move(h_n), std::move(c_n));
  };
  return stack(layer, input, h0, c0, weights, resets, num_layers, bidirectional, dropout, training, batch_first);
}

// One step: input [B, I], states [B, H] -> h' [B, H], c' [B, H] or empty. The same layer with T == 1.
std::tuple<Tensor, Tensor> cell_step(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                     at::TensorList params, bool has_biases, int64_t cell) {
  const auto lifted = [](const OptionalTensor& t) { return t ? OptionalTensor(t->unsqueeze(0)) : std::nullopt; };
  auto [y, h_n, c_n, gates, cs] = layer_op().call(input.unsqueeze(0), lifted(h), lifted(c), params, has_biases, std::nullopt,
                                                  std::nullopt, std::nullopt, cell, /*bidirectional=*/false, /*save=*/false);
  const bool lstm = static_cast<CellKind>(cell) == CellKind::kLstm;
  return {y.squeeze(0), lstm ? c_n.squeeze(0) : c_n};
}

}  // namespace

bool nothing_intercepts() {
  // Tracing, functorch and modes add keys; autocast is excluded unless it is on; forward-mode AD has a level.
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty() && (c10::default_excluded_set - keys.excluded_).empty() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool is_plain(const Tensor& t) {
  return t.layout() == at::kStrided && !t.unsafeGetTensorImpl()->is_python_dispatch() && !t.is_nested() && !t.is_conj() &&
         !t.is_neg();
}

Tensor joined(const std::vector<Tensor>& states) {
  return states.size() == 1 || !states[0].defined() ? states[0] : at::cat(states);
}

OptionalTensor states_of_layer(const OptionalTensor& states, int64_t layer, int64_t directions, int64_t layers) {
  if (!states || layers == 1) return states;
  return states->slice(0, layer * directions, (layer + 1) * directions);
}

at::TensorList params_of_layer(at::TensorList weights, int64_t layer, int64_t layers) {
  const size_t count = weights.size() / layers;
  return weights.slice(layer * count, count);
}

bool runs_plainly_on_cpu(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights) {
  if (!nothing_intercepts() || at::hasCallbacks()) return false;
  const auto plain = [&](const Tensor& t) { return t.is_cpu() && is_plain(t); };
  return plain(input) && (!h0 || plain(*h0)) && (!c0 || plain(*c0)) && std::all_of(weights.begin(), weights.end(), plain);
}

std::tuple<Tensor, Tensor, Tensor> rnn_on_cpu(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                              at::TensorList weights, const OptionalTensor& lengths,
                                              const OptionalTensor& offsets, const OptionalTensor& resets, int64_t cell,
                                              int64_t num_layers, bool has_biases, bool bidirectional, double dropout,
                                              bool training, bool batch_first) {
  if (differentiates(input, h0, c0, weights)) {
    auto [y, h_n, c_n] = rnn(input, h0, c0, weights, lengths, offsets, resets, cell, num_layers, has_biases, bidirectional,
                             dropout, training, batch_first);
    return {y, h_n, static_cast<CellKind>(cell) == CellKind::kLstm ? c_n : Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto layer = [&](const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                         const OptionalTensor& layer_resets) {
    ForwardCall call = prepare_forward(
        {x, h, c, params, has_biases, lengths, offsets, layer_resets, static_cast<CellKind>(cell), bidirectional},
        /*save=*/false);
    run_forward(call);
    return std::tuple(std::move(call.y), std::move(call.h_n), std::move(call.c_n));
  };
  if (num_layers == 1 && !batch_first) return layer(input, h0, c0, weights, resets);
  return stack(layer, input, h0, c0, weights, resets, num_layers, bidirectional, dropout, training, batch_first);
}

std::tuple<Tensor, Tensor> cell_on_cpu(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                       at::TensorList params, bool has_biases, int64_t cell) {
  if (differentiates(input, h, c, params)) {
    auto [new_h, new_c] = cell_step(input, h, c, params, has_biases, cell);
    return {new_h, static_cast<CellKind>(cell) == CellKind::kLstm ? new_c : Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  ForwardCall call = prepare_forward({input, h, c, params, has_biases, std::nullopt, std::nullopt, std::nullopt,
                                      static_cast<CellKind>(cell), /*bidirectional=*/false, /*one_step=*/true},
                                     /*save=*/false);
  run_forward(call);
  return {std::move(call.h_n), std::move(call.c_n)};
}

}  // namespace fused_rnn

TORCH_LIBRARY(fused_rnn, m) {
  m.def(
      "layer(Tensor x, Tensor? h0, Tensor? c0, Tensor[] params, bool has_biases, Tensor? lengths, Tensor? offsets, "
      "Tensor? resets, int cell, bool bidirectional, bool save) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cs)");
  m.def(
      "layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] params, "
      "bool has_biases, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor y, Tensor gates, Tensor cs, int cell, "
      "bool bidirectional, bool[3] mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  m.def(
      "layer_backward_differentiable(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] params, bool has_biases, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor y, Tensor gates, "
      "Tensor cs, int cell, bool bidirectional, bool[3] mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  m.def(
      "rnn(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? offsets, Tensor? resets, "
      "int cell, int num_layers, bool has_biases, bool bidirectional, float dropout, bool training, bool batch_first) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def("cell(Tensor input, Tensor? h, Tensor? c, Tensor[] params, bool has_biases, int cell) -> (Tensor h, Tensor c)");
  m.impl("rnn", c10::DispatchKey::CompositeImplicitAutograd, fused_rnn::rnn);
  m.impl("cell", c10::DispatchKey::CompositeImplicitAutograd, fused_rnn::cell_step);
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("layer", fused_rnn::layer_cpu);
  m.impl("layer_backward", fused_rnn::layer_backward_cpu);
}

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  m.impl("layer", fused_rnn::layer_autograd);
  m.impl("layer_backward", fused_rnn::layer_backward_autograd);
}
