#include "torch/graph_stack_cuda.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "plan/cudnn.h"
#include "torch/choice_cuda.h"
#include "torch/cudnn_cuda.h"
#include "torch/device.h"
#include "torch/families_cuda.h"
#include "torch/version.h"

namespace fused_rnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using PartSignature = LayerOutputs(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                                   int64_t recipe);

const c10::TypedOperatorHandle<PartSignature>& part_op() {
  static const auto op = find_op<PartSignature>("fused_rnn::stack");
  return op;
}
const c10::TypedOperatorHandle<LayerBackwardSignature>& part_backward_op() {
  static const auto op = find_op<LayerBackwardSignature>("fused_rnn::stack_backward");
  return op;
}

// The ops' list `rows`: offsets, then those of the host where these are known.
RowList part_rows(const Rows& rows) {
  RowList list = list_of(rows);
  if (rows.host_offsets) list.tensors.push_back(*rows.host_offsets);
  return list;
}
Rows rows_of_part(at::TensorList list, int64_t recipe) {
  const size_t count = (recipe & kHasOffsets) != 0;
  TORCH_CHECK_VALUE(!(recipe & kHasRows & ~kHasOffsets), "rows: expected offsets at most, got others");
  Rows rows = rows_of(list.slice(0, std::min(count, list.size())), recipe);
  if (list.size() > count) rows.host_offsets = list[count];
  return rows;
}

// The part of a stack that a call of the ops is.
struct Part {
  const Rows rows;
  const Call call;

  Part(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList list, int64_t recipe)
      : rows(rows_of_part(list, recipe)), call{x, states, params, rows, recipe_of(recipe, /*dropout=*/0)} {
    const Recipe& r = call.recipe;
    TORCH_CHECK_VALUE(
        !r.all_states && !r.batch_first && !r.family && x.is_floating_point() && params.size() % r.num_layers == 0,
        "fused_rnn::stack: expected input [T, B, I] or packed, and a recipe without return_all_states, "
        "batch_first and family");
  }
  Part(const Part&) = delete;
};

// Nothing of `t` but its memory.
Tensor handle_of(const Tensor& t) {
  TORCH_INTERNAL_ASSERT(t.is_contiguous() && t.storage_offset() == 0);
  return at::empty({0}, t.options().dtype(at::kByte)).set_(t.storage(), 0, {0}, {1});
}
int64_t bytes_of(const Tensor& handle) {
  return handle.storage_offset() == 0 ? static_cast<int64_t>(handle.storage().nbytes()) : 0;
}
// The tensor whose memory a handle has; undefined if it has another one.
Tensor tensor_of_handle(const Tensor& handle, at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor t = at::empty({0}, options);
  if (bytes_of(handle) != c10::multiply_integers(shape) * static_cast<int64_t>(t.element_size())) return {};
  return t.set_(handle.storage(), 0, shape, at::detail::defaultStrides(shape));
}

// The bytes of cuDNN's reserve for a part, as the latest forward has found them: what tells its memory from another one.
class ReserveSizes {
 public:
  void keep(const Call& s, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (sizes_.size() >= kMost) sizes_.clear();
    sizes_[key_of(s)] = bytes;
  }
  int64_t find(const Call& s) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(key_of(s));
    return found == sizes_.end() ? -1 : found->second;
  }

 private:
  using Key = std::vector<int64_t>;
  static constexpr size_t kMost = 256;  // keys may hold the offsets of every step

  static Key key_of(const Call& s) {
    Key key{pack(s.recipe), static_cast<int64_t>(s.x.scalar_type()), s.x.get_device()};
    for (const Tensor* t : {&s.x, &s.params[0], &s.params[1]}) key.insert(key.end(), t->sizes().begin(), t->sizes().end());
    if (s.rows.host_offsets) {
      const auto* offsets = s.rows.host_offsets->const_data_ptr<int64_t>();
      key.insert(key.end(), offsets, offsets + s.rows.host_offsets->numel());
    }
    return key;
  }
  std::mutex mutex_;
  std::map<Key, int64_t> sizes_;
};
ReserveSizes& reserve_sizes() {
  static ReserveSizes& all = *new ReserveSizes;
  return all;
}

// saved: cuDNN's reserve, then of every layer gates and c, where the cell has them, and of all but the last y. Those of the
// family that has not run have no memory.
struct Handles {
  size_t of_layer, count;

  explicit Handles(const Recipe& r)
      : of_layer(saved_count(r.cell, /*has_options=*/false)), count(1 + r.num_layers * (of_layer + 1) - 1) {}
  size_t first(int64_t layer) const { return 1 + layer * (of_layer + 1); }
};

std::vector<Tensor> no_memory(const Call& s) {
  std::vector<Tensor> saved(Handles(s.recipe).count);
  for (Tensor& t : saved) t = at::empty({0}, s.x.options().dtype(at::kByte));
  return saved;
}

LayerOutputs part_by_cudnn(const Call& s) {
  CudnnOutputs made = cudnn_forward(s);
  std::vector<Tensor> saved = no_memory(s);
  saved[0] = handle_of(made.reserve);
  reserve_sizes().keep(s, bytes_of(saved[0]));
  return {made.y, {made.last.begin(), made.last.end()}, saved};
}

LayerOutputs part_by_layers(const Call& s) {
  const Handles handles(s.recipe);
  std::vector<Tensor> saved = no_memory(s);
  std::vector<States> last;
  Tensor y = s.x;
  for (int64_t l = 0; l < s.recipe.num_layers; ++l) {
    const States states = states_of_layer(s, l);
    const auto [of_layer, ends, kept] =
        call_layer({y, states, params_of_layer(s, l), s.rows, s.recipe.of_layer()}, /*save=*/true);
    size_t next = handles.first(l);
    for (const Tensor& t : kept) saved[next++] = handle_of(t);
    if (l + 1 < s.recipe.num_layers) saved[next] = handle_of(of_layer);
    last.emplace_back(ends.begin(), ends.end());
    y = of_layer;
  }
  const States all = joined(last);
  return {y, {all.begin(), all.end()}, saved};
}

LayerOutputs forward_of(const Call& s) {
  return run_chosen_part(
      s, [&] { return part_by_cudnn(s); },
      [&](const Recipe& recipe) { return part_by_layers({s.x, s.states, s.params, s.rows, recipe}); });
}

LayerOutputs stack_cuda(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows, int64_t recipe) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device_guard(x.device());
  return forward_of(Part(x, states, params, rows, recipe).call);
}

// What the layers have saved, and their outputs; none if memory of it is lost.
std::optional<std::vector<LayerOutputs>> outputs_of_layers(const Call& s, const Tensor& y, at::TensorList saved) {
  const Handles handles(s.recipe);
  const auto options = s.x.options().requires_grad(false);
  std::vector<LayerOutputs> layers;
  for (int64_t l = 0; l < s.recipe.num_layers; ++l) {
    const Tensor& w_hh = params_of_layer(s, l)[1];
    const int64_t D = s.recipe.directions(), H = w_hh.size(0) / gate_count(s.recipe.cell);
    const int64_t N = s.rows.offsets ? s.x.size(0) : s.x.size(0) * s.x.size(1);
    std::vector<Tensor> kept;
    size_t next = handles.first(l);
    if (saves_gates(s.recipe.cell, false)) {
      kept.push_back(tensor_of_handle(saved[next++], {D, N, slot_count(s.recipe.cell), H}, options));
    }
    if (traits_of(s.recipe.cell).has_c) kept.push_back(tensor_of_handle(saved[next++], {D, N, H}, options));
    const Tensor of_layer = l + 1 == s.recipe.num_layers ? y
                                                         : tensor_of_handle(
                                                               saved[next],
                                                               [&] {
                                                                 at::DimVector shape(s.x.sizes());
                                                                 shape.back() = D * w_hh.size(1);
                                                                 return shape;
                                                               }(),
                                                               options);
    kept.push_back(of_layer);
    if (std::any_of(kept.begin(), kept.end(), [](const Tensor& t) { return !t.defined(); })) return std::nullopt;
    layers.emplace_back(of_layer, std::vector<Tensor>{}, kept);
  }
  return layers;
}

LayerGradients backward_of_layers(const Call& s, const std::vector<LayerOutputs>& layers, const OptionalTensor& given,
                                  const std::vector<OptionalTensor>& dlast, GradientMask mask) {
  const RowList rows = list_of(s.rows);
  const int64_t D = s.recipe.directions(), count = s.recipe.num_layers;
  std::vector<std::vector<Tensor>> dstates(s.states.size());
  std::vector<Tensor> dparams;
  Tensor dy = tensor_of(given);
  for (int64_t l = count - 1; l >= 0; --l) {
    const Tensor& x = l == 0 ? s.x : std::get<0>(layers[l - 1]);
    std::vector<Tensor> of_last;
    for (const OptionalTensor& t : dlast) {
      of_last.push_back(t ? t->slice(0, l * D, (l + 1) * D) : at::empty({0}, s.x.options()));
    }
    auto [dx, of_states, of_params] = layer_backward_op().call(
        optional_of(dy), of_last, x, states_of_layer(s, l), params_of_layer(s, l), rows.tensors, std::get<2>(layers[l]),
        pack(s.recipe.of_layer()) | rows.bits, {l > 0 || mask.x, mask.states, mask.weights});
    dy = dx;
    for (size_t i = 0; i < dstates.size(); ++i) dstates[i].insert(dstates[i].begin(), of_states[i]);
    dparams.insert(dparams.begin(), of_params.begin(), of_params.end());
  }
  std::vector<Tensor> joined_states;
  for (const std::vector<Tensor>& of_layers : dstates) joined_states.push_back(at::cat(of_layers));
  return {dy, joined_states, dparams};
}

// As the fake kernel has it: [0] for what nobody asked for, and tensors with memory of their own, which cuDNN's gradients of
// weights are not: a compiled graph counts on their alignment.
LayerGradients in_full(const Call& s, LayerGradients made, GradientMask mask) {
  const auto none = [&] { return at::empty({0}, s.x.options()); };
  auto& [dx, dstates, dparams] = made;
  if (!mask.x) dx = none();
  if (!mask.states) dstates.assign(s.states.size(), none());
  if (!mask.weights) dparams.assign(s.params.size(), none());
  for (Tensor& t : dparams) {
    if (t.defined() && t.storage().nbytes() != t.nbytes()) t = t.clone();
  }
  return made;
}

LayerGradients stack_backward_cuda(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                   at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe,
                                   std::array<bool, 3> wanted) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const c10::cuda::CUDAGuard device_guard(x.device());
  const Part part(x, states, params, rows, recipe);
  const Call& s = part.call;
  const GradientMask mask{wanted[0], wanted[1], wanted[2]};
  const std::vector<OptionalTensor> of_last = gradients_of_last(s.recipe, dlast);
  TORCH_CHECK_VALUE(saved.size() == 1 + Handles(s.recipe).count, "saved: expected y and ", Handles(s.recipe).count,
                    " tensors of forward, got ", saved.size());
  Tensor y = saved[0];
  std::vector<Tensor> kept = saved.slice(1).vec();
  bool made_again = false;
  const auto by_cudnn = [&]() -> std::optional<LayerGradients> {
    const int64_t bytes = bytes_of(kept[0]);
    if (bytes == 0 || bytes != reserve_sizes().find(s)) return std::nullopt;
    CudnnOutputs made{y, {}, at::empty({0}, kept[0].options()).set_(kept[0].storage(), 0, {bytes}, {1})};
    // cuDNN writes into it. A replay of a captured graph may come again with what one forward has left.
    if (!made_again && (torch::autograd::get_current_graph_task_keep_graph() || is_captured())) {
      made.reserve = made.reserve.clone();
    }
    return cudnn_backward(s, made, dy, of_last, mask);
  };
  for (;;) {
    if (auto made = by_cudnn()) return in_full(s, *std::move(made), mask);
    if (const auto layers = outputs_of_layers(s, y, kept)) {
      return in_full(s, backward_of_layers(s, *layers, dy, of_last, mask), mask);
    }
    TORCH_INTERNAL_ASSERT(!made_again, "forward has left nothing for backward");
    made_again = true;
    std::tie(y, std::ignore, kept) = forward_of(s);
  }
}

// The node of a part. The caller may write into y before backward runs: it is kept as an alias with its version then, and
// made again where it was written (layer_autograd.cpp does likewise).
class PartFunction : public torch::autograd::Function<PartFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList states, at::TensorList params,
                               at::TensorList rows, int64_t recipe) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [y, last, handles] = part_op().call(x, states, params, rows, recipe);
    variable_list saved{x, y.variable_data()};
    for (at::TensorList list : {at::TensorList(handles), states, params, rows}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["lengths"] = std::vector<int64_t>{
        static_cast<int64_t>(handles.size()), static_cast<int64_t>(states.size()), static_cast<int64_t>(params.size())};
    ctx->saved_data["recipe"] = recipe;
    ctx->saved_data["output_version"] = version_of(y);
    ctx->saved_data["output_version_then"] = static_cast<int64_t>(y._version());
    ctx->saved_data["need"] = std::vector<bool>{x.requires_grad(), any_requires_grad(states), any_requires_grad(params)};
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable(handles);
    variable_list results{y};
    results.insert(results.end(), last.begin(), last.end());
    results.insert(results.end(), handles.begin(), handles.end());
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto lengths = ctx->saved_data["lengths"].toIntVector();
    const int64_t recipe = ctx->saved_data["recipe"].toInt();
    const at::TensorList all(saved), kept = all.slice(1, 1 + lengths[0]), states = all.slice(2 + lengths[0], lengths[1]),
                                     params = all.slice(2 + lengths[0] + lengths[1], lengths[2]),
                                     rows = all.slice(2 + lengths[0] + lengths[1] + lengths[2]);
    const Part part(saved[0], states, params, rows, recipe);
    const Call& s = part.call;
    const size_t results = 1 + last_count(s.recipe), others = rows.size() + 1;  // gradients of rows and recipe: none
    grads.resize(results);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) {
      return variable_list(1 + states.size() + params.size() + others);
    }
    if (at::GradMode::is_enabled()) {
      variable_list made = gradients_by_layers(s, grads);
      made.resize(made.size() + others);
      return made;
    }
    std::vector<Tensor> given = kept.vec();
    const bool written =
        ctx->saved_data["output_version"].toTensor()._version() != ctx->saved_data["output_version_then"].toInt();
    if (written) {
      auto [y, last, handles] = part_op().call(s.x, states, params, rows, recipe);
      given.assign(1, y);
      given.insert(given.end(), handles.begin(), handles.end());
    }
    std::vector<Tensor> dlast;
    for (size_t i = 1; i < results; ++i) {
      dlast.push_back(grads[i].defined() ? grads[i] : at::empty({0}, s.x.options().requires_grad(false)));
    }
    const auto need = ctx->saved_data["need"].toBoolList();
    const GradientMask mask{need[0], need[1], need[2]};
    const auto [dx, dstates, dparams] = part_backward_op().call(optional_of(grads[0]), dlast, s.x, states, params, rows,
                                                                given, recipe, {mask.x, mask.states, mask.weights});
    variable_list made{mask.x ? dx : Tensor()};
    for (const Tensor& t : dstates) made.push_back(mask.states ? t : Tensor());
    for (const Tensor& t : dparams) made.push_back(mask.weights ? t : Tensor());
    made.resize(made.size() + others);
    return made;
  }
};

LayerOutputs stack_autograd(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                            int64_t recipe) {
  const Part part(x, states, params, rows, recipe);
  const variable_list made = PartFunction::apply(x, states, params, rows, recipe);
  const auto last = made.begin() + 1, saved = last + last_count(part.call.recipe);
  return {made[0], {last, saved}, {saved, made.end()}};
}

Results part_in_graph(const Call& s) {
  Recipe recipe = s.recipe;
  recipe.in_graph = recipe.training = false;  // no mask is drawn here
  const RowList rows = part_rows(s.rows);
  const auto [y, last, saved] = part_op().call(s.x, s.states, s.params, rows.tensors, pack(recipe) | rows.bits);
  return {y, {last.begin(), last.end()}};
}

// Neither torch.func's transforms nor forward-mode AD, whose rules know the layer's op alone.
bool is_transformed(const Call& s) {
  constexpr c10::DispatchKeySet keys{c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                     c10::DispatchKey::FuncTorchDynamicLayerBackMode,
                                     c10::DispatchKey::FuncTorchVmapMode,
                                     c10::DispatchKey::FuncTorchGradWrapper,
                                     c10::DispatchKey::FuncTorchBatched,
                                     c10::DispatchKey::Batched};
  const auto wrapped = [&](const Tensor& t) { return t.key_set().has_any(keys); };
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(keys) || wrapped(s.x) ||
         std::any_of(s.states.begin(), s.states.end(), wrapped) || std::any_of(s.params.begin(), s.params.end(), wrapped) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

}  // namespace

bool serves_in_graph(const Call& s) {
  const bool recorded = !nothing_intercepts() || !is_plain(s.x);
  return s.recipe.in_graph && !s.recipe.family && recorded && differentiates(s) && cudnn_mode(s.recipe.cell) >= 0 &&
         !s.rows.lengths && !s.rows.resets && (!s.rows.offsets || s.rows.host_offsets) && !is_transformed(s);
}

Results rnn_in_graph(const Call& s) { return time_major_stacks(s, part_in_graph); }

}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, FUSED_RNN_DEVICE_KEY, m) {
  m.impl("stack", fused_rnn::stack_cuda);
  m.impl("stack_backward", fused_rnn::stack_backward_cuda);
}
TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) { m.impl("stack", fused_rnn::stack_autograd); }
