// The ops of the library: schemas, and the composites (stack, cell) above the layer. The layer is registered in ops_cpu.cpp
// and ops_cuda.cpp, autograd in layer_autograd.cpp, autocast in ops_autocast.cpp; fake kernels are in
// fused_rnn/_ops.py, the differentiable form of backward in fused_rnn/_derivatives.py.
#include "torch/ops.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/library.h>

#include "torch/device.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/choice_cuda.h"
#include "torch/graph_stack_cuda.h"
#endif

namespace fused_rnn {
namespace {

// Lengths, offsets or resets on input's device.
OptionalTensor beside(const OptionalTensor& rows, const Tensor& input) {
  if (!rows) return rows;
#ifdef FUSED_RNN_WITH_CUDA
  const auto type = rows->scalar_type();
  const bool from_host = is_on_device(input) && rows->is_cpu() && (type == at::kLong || type == at::kBool);
  if (from_host && nothing_intercepts() && is_plain(input) && is_plain(*rows)) return on_cuda(*rows, input);
#endif
  return rows->device() == input.device() ? *rows : rows->to(input.device());
}

Results results_of(LayerOutputs outputs) {
  const std::vector<Tensor>& last = std::get<1>(outputs);
  return {std::get<0>(outputs), {last.begin(), last.end()}};
}

// One step: input [B, I], states [B, H] -> last states [B, H]. A layer's call with T == 1.
Results run_step(const Call& call) {
  if (nothing_intercepts()) {  // before unsqueeze, which says less of freed memory
    if (is_plain(call.x)) check_memory("input", call.x);
    for (const Tensor& t : call.states) {
      if (is_plain(t)) check_memory("hidden", t);
    }
  }
  const Tensor x = call.x.unsqueeze(0);
  States states(call.states.begin(), call.states.end());
  for (Tensor& t : states) t = t.unsqueeze(0);
  Results made = results_of(call_layer({x, states, call.params, call.rows, call.recipe}, /*save=*/false));
  made.last[0] = made.y;
  for (Tensor& t : made.last) t = t.squeeze(0);
  return made;
}

// A stack's call: its layers beside each other, or in turn.
Results run_layers(const Call& call) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_plain_call(call)) {
    if (auto results = overlapped_rnn(call)) return *std::move(results);
  }
#endif
  return run_stack(call, [](const Call& layer) { return results_of(call_layer(layer, /*save=*/false)); });
}

}  // namespace

Results run_composite(const Call& call) {
#ifdef FUSED_RNN_WITH_CUDA
  if (call.one_step) return is_on_device(call.x) && is_plain_call(call) ? run_chosen(call, run_step) : run_step(call);
#else
  if (call.one_step) return run_step(call);
#endif
  const OptionalTensor& offsets = call.rows.offsets;
  Rows rows{beside(call.rows.lengths, call.x),
            beside(offsets, call.x),
            beside(call.rows.resets, call.x),
            std::nullopt,
            call.rows.reset_states,
            call.rows.options};
  if (offsets && offsets->is_cpu()) rows.host_offsets = offsets;
  const Call here{call.x, call.states, call.params, rows, call.recipe};
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(here.x) && is_plain_call(here)) {
    return serves_in_graph(here) ? rnn_in_graph(here) : run_chosen(here, run_layers);
  }
#endif
  return run_layers(here);
}

std::tuple<Tensor, std::vector<Tensor>> rnn_op(const Tensor& input, at::TensorList states, at::TensorList weights,
                                               at::TensorList rows, int64_t recipe, double dropout) {
  const Rows given = rows_of(rows, recipe);
  Results made = run_composite({input, states, weights, given, recipe_of(recipe, dropout)});
  return {std::move(made.y), {made.last.begin(), made.last.end()}};
}

std::vector<Tensor> cell_op(const Tensor& input, at::TensorList states, at::TensorList params, int64_t recipe) {
  const Rows all;
  const Results made = run_composite({input, states, params, all, layer_recipe_of(recipe), /*one_step=*/true});
  return {made.last.begin(), made.last.end()};
}

LayerOutputs call_layer(const Call& call, bool save) {
  static const auto op = find_op<LayerSignature>("fused_rnn::layer");
  const RowList rows = list_of(call.rows);
  return op.call(call.x, call.states, call.params, rows.tensors, pack(call.recipe) | rows.bits, save);
}

const c10::TypedOperatorHandle<LayerBackwardSignature>& layer_backward_op() {
  static const auto op = find_op<LayerBackwardSignature>("fused_rnn::layer_backward");
  return op;
}

const c10::TypedOperatorHandle<SampleBackwardSignature>& sample_backward_op() {
  static const auto op = find_op<SampleBackwardSignature>("fused_rnn::layer_backward_samples");
  return op;
}

namespace {

// The keys that intercept calls beside those that always do; none where something else intercepts them.
std::optional<c10::DispatchKeySet> intercepting_keys() {
  // Tracing, functorch and modes add keys; autocast is excluded unless it is on; forward-mode AD has a level.
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const bool other = !(c10::default_excluded_set - keys.excluded_).empty() ||
                     c10::impl::TorchDispatchModeTLS::any_modes_set() ||
                     torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
  return other ? std::nullopt : std::optional<c10::DispatchKeySet>(keys.included_ - c10::default_included_set);
}

}  // namespace

bool nothing_intercepts() {
  const auto keys = intercepting_keys();
  return keys && keys->empty();
}

bool only_transforms() {
  constexpr c10::DispatchKeySet transforms{c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                           c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                           c10::DispatchKey::FuncTorchVmapMode};
  const auto keys = intercepting_keys();
  return keys && !keys->empty() && (*keys - transforms).empty();
}

bool is_plain(const Tensor& t) {
  // What a transform of torch.func made may outlive it; Batched is torch's first vmap.
  constexpr c10::DispatchKeySet wrapped{c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched,
                                        c10::DispatchKey::Batched};
  return !t.key_set().has_any(wrapped) && t.layout() == at::kStrided && !t.unsafeGetTensorImpl()->is_python_dispatch() &&
         !t.is_nested() && !t.is_conj() && !t.is_neg() && !t._is_zerotensor();
}

bool is_plain_on_cpu(const Tensor& t) { return t.is_cpu() && is_plain(t); }

bool is_plain_for_kernels(const Tensor& t) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(t)) return is_plain(t);
#endif
  return is_plain_on_cpu(t);
}

bool runs_plainly(const Call& call) {
  if (!nothing_intercepts() || at::hasCallbacks()) return false;
  return is_plain_for_kernels(call.x) && std::all_of(call.states.begin(), call.states.end(), is_plain_for_kernels) &&
         std::all_of(call.params.begin(), call.params.end(), is_plain_for_kernels);
}

States take_all_states(const Call& layer, Results& made) {
  const int64_t D = layer.recipe.directions();
  const Tensor& y = made.y;
  const auto P = y.sym_size(-1) / D;
  States all;
  if (layer.rows.offsets) {
    all.push_back(y.reshape_symint({y.sym_size(0), D, P}));
  } else {
    all.push_back(y.reshape_symint({y.sym_size(0), y.sym_size(1), D, P}).transpose(1, 2));
  }
  if (traits_of(layer.recipe.cell).has_c) {
    const Tensor cs = made.last.pop_back_val();  // [D, N, H]
    all.push_back(layer.rows.offsets ? cs.transpose(0, 1)
                                     : cs.reshape_symint({D, y.sym_size(0), y.sym_size(1), cs.sym_size(2)}).transpose(0, 1));
  }
  return all;
}

States joined_steps(const std::vector<States>& of_layers) {
  States all;
  for (size_t i = 0; i < of_layers[0].size(); ++i) {
    std::vector<Tensor> parts;
    for (const States& states : of_layers) parts.push_back(states[i]);
    if (parts.size() > 1) {
      all.push_back(at::cat(parts, 1));
    } else if (i == 0) {  // of y's own memory, into which callers may write
      all.push_back(parts[0].clone(at::MemoryFormat::Contiguous));
    } else {
      all.push_back(parts[0].contiguous());
    }
  }
  return all;
}

Tensor dropout_between(const Tensor& y, double probability) { return at::dropout(y, probability, /*train=*/true); }

States joined(const std::vector<States>& of_layers) {
  if (of_layers.size() == 1) return of_layers[0];
  States all;
  for (size_t i = 0; i < of_layers[0].size(); ++i) {
    std::vector<Tensor> parts;
    for (const States& states : of_layers) parts.push_back(states[i]);
    all.push_back(at::cat(parts));
  }
  return all;
}

}  // namespace fused_rnn

TORCH_LIBRARY(fused_rnn, m) {
  m.def(
      "layer(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, int recipe, bool save) "
      "-> (Tensor y, Tensor[] last, Tensor[] saved)");
  m.def(
      "layer_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int recipe, bool[3] mask) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
  m.def(
      "layer_backward_differentiable(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, "
      "Tensor[] rows, Tensor[] saved, int recipe, bool[3] mask) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
  // call: recipe, mask, samples (ops.h). Row b of a step belongs to sample b % samples; dparams are those of each sample,
  // [samples, ...].
  m.def(
      "layer_backward_samples(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int[] call) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
  // The gradients of the pre-activations [D, N, S, H], in the order of core/params.h. Not differentiable.
  m.def(
      "layer_backward_gates(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int recipe) -> (Tensor dgates, Tensor[] dstates)");
  // Of layer_backward (samples: 0) or layer_backward_samples: gradients of dy, dlast, x, states, reset states and params;
  // grads: of the results; call: recipe, mask, samples, and which are asked for. A tensor of shape [0] stands for none.
  m.def(
      "layer_double_backward(Tensor[] grads, Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, "
      "Tensor[] rows, Tensor[] saved, int[] call) -> Tensor[]");
  // What layer_double_backward is made of where kernels have it (torch/second_order.cpp), of layer_backward, for float32 and
  // float64 on a CPU. wanted: recipe, and whether gradients of x, of states, of params are.
  m.def(
      "layer_second_order(Tensor[] grads, Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, "
      "Tensor[] rows, Tensor[] saved, int[] wanted) -> Tensor[]");
  // Tangents of y and the last states, from those of x, states, reset states and params (torch/tangents.h): by the kernels
  // where they have them, else by torch's ops. saved: of forward with its c after each step, where it has been kept.
  m.def(
      "layer_tangents(Tensor[] tangents, Tensor y, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int recipe) -> Tensor[]");
  // The same by the kernels (torch/second_order.cpp), for float32 and float64 on a CPU. saved ends with y. call: recipe and
  // samples; with samples the tangents of params are [samples, ...], and row b of a step belongs to sample b % samples.
  m.def(
      "layer_jvp(Tensor[] tangents, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, Tensor[] saved, int[] call) "
      "-> Tensor[]");
  m.def(
      "layer_backward_tangents(Tensor[] tangents, Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, "
      "Tensor[] rows, Tensor[] saved, int[] call) -> Tensor[]");
  m.def(
      "rnn(Tensor input, Tensor[] states, Tensor[] weights, Tensor[] rows, int recipe, float dropout) "
      "-> (Tensor output, Tensor[] last)");
  // A stack's training call in a recorded graph, on a GPU: x is [T, B, I] or packed, nothing is dropped. rows may end with
  // the host's offsets. saved: memory whose sizes the graph is not told (torch/graph_stack_cuda.h).
  m.def(
      "stack(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, int recipe) "
      "-> (Tensor y, Tensor[] last, Tensor[] saved)");
  // saved begins with y.
  m.def(
      "stack_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int recipe, bool[3] mask) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
  m.def("cell(Tensor input, Tensor[] states, Tensor[] params, int recipe) -> Tensor[]");
  m.impl("rnn", c10::DispatchKey::CompositeImplicitAutograd, fused_rnn::rnn_op);
  m.impl("cell", c10::DispatchKey::CompositeImplicitAutograd, fused_rnn::cell_op);
}
