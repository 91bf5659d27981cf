// The ops of the library: schemas, the CPU kernels' registration, and the composites (stack, cell) above the layer. CUDA
// kernels are registered in ops_cuda.cpp, autograd in layer_autograd.cpp, autocast in ops_autocast.cpp, fake kernels and the
// differentiable form of backward in fused_rnn/_ops.py.
#include "torch/ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include "cpu/cpu.h"
#include "torch/differentiable.h"
#include "torch/layer.h"
#include "torch/workspace.h"

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
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, cell_of(cell), bidirectional};
  ForwardCall call = prepare_forward(in, save);
  run_forward(call);
  return forward_outputs(call, save);
}

LayerGradients layer_backward_cpu(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                  const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                                  bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                                  const OptionalTensor& resets, const OptionalTensor& y, const Tensor& gates,
                                  const Tensor& cs, int64_t cell, bool bidirectional, std::array<bool, 3> mask) {
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, cell_of(cell), bidirectional};
  const BackwardInputs grads{dy, dh_n, dc_n, y, gates, cs};
  const GradientMask wanted{mask[0], mask[1], mask[2]};
  BackwardCall call = prepare_backward(in, grads, wanted);
  if (call.params.seq.B > 0) {
    Workspace workspace;
    cpu::backward(call.params, [&](int64_t bytes) { return workspace.take(bytes); });
  }
  return gradients_of_layer(in, grads, call, wanted);
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
  const bool has_c = traits_of(cell_of(cell)).has_c;
  return {y.squeeze(0), has_c ? c_n.squeeze(0) : c_n};
}

}  // namespace

const LayerOp& layer_op() {
  static const LayerOp op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::layer", "").typed<LayerSignature>();
  return op;
}

const LayerBackwardOp& layer_backward_op() {
  static const LayerBackwardOp op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::layer_backward", "").typed<LayerBackwardSignature>();
  return op;
}

bool nothing_intercepts() {
  // Tracing, functorch and modes add keys; autocast is excluded unless it is on; forward-mode AD has a level.
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty() && (c10::default_excluded_set - keys.excluded_).empty() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool is_plain(const Tensor& t) {
  return t.layout() == at::kStrided && !t.unsafeGetTensorImpl()->is_python_dispatch() && !t.is_nested() && !t.is_conj() &&
         !t.is_neg() && !t._is_zerotensor();
}

Tensor joined(const std::vector<Tensor>& states) {
  return states.size() == 1 || !states[0].defined() ? states[0] : at::cat(states);
}

OptionalTensor states_of_layer(const OptionalTensor& states, int64_t layer, int64_t directions, int64_t layers) {
  if (!states || layers == 1) return states;
  TORCH_CHECK(states->dim() == 3 && states->sym_size(0) == layers * directions, "h0, c0: expected shape [",
              layers * directions, ", B, .] (num_layers * directions), got ", states->sym_sizes());
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
    return {y, h_n, traits_of(cell_of(cell)).has_c ? c_n : Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto layer = [&](const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params,
                         const OptionalTensor& layer_resets) {
    ForwardCall call =
        prepare_forward({x, h, c, params, has_biases, lengths, offsets, layer_resets, cell_of(cell), bidirectional},
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
    return {new_h, traits_of(cell_of(cell)).has_c ? new_c : Tensor()};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  ForwardCall call = prepare_forward({input, h, c, params, has_biases, std::nullopt, std::nullopt, std::nullopt,
                                      cell_of(cell), /*bidirectional=*/false, /*one_step=*/true},
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
      "bool has_biases, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor? y, Tensor gates, Tensor cs, int cell, "
      "bool bidirectional, bool[3] mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dparams)");
  m.def(
      "layer_backward_differentiable(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor[] params, bool has_biases, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor? y, Tensor gates, "
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
