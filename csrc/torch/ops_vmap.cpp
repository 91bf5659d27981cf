// The layer and its backward under torch.func.vmap where every sample has the same weights and all is plain tensors on a
// CPU, as for per-sample gradients: the vmapped dimension becomes rows of the batch. fused_rnn/_transforms.py says how, and
// has the rules for every other call (the ops layer_vmapped and layer_backward_vmapped) and for the other ops. In Python
// the same took 0.15 ms more of a forward and backward, as much as the kernels of a small layer.
#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/ops.h"

namespace fused_rnn {
namespace {

namespace functorch = at::functorch;

constexpr int64_t kMostElements = int64_t{1} << 24;  // _transforms.py's _ELEMENTS

// A tensor of a call without the level of vmap: the samples' along `dim`, or one for all.
struct Given {
  Tensor value;
  std::optional<int64_t> dim;

  int64_t sample_dims() const { return value.dim() - dim.has_value(); }
};

int64_t second_last(const Given& given) { return given.sample_dims() - 2; }
// gates [D, N, S, H], c after each step [D, N, H], y [T, B, D*P].
int64_t of_saved(const Given& given) { return given.sample_dims() == 4 ? 1 : second_last(given); }

// The innermost level of vmap among tensors; -1: there is none. torch's header that gives the level that it runs cannot be
// included. Where that is a level further in, with no tensor of its own here, it makes no difference to a call.
void include_level(const Tensor& t, int64_t& level) {
  if (const auto* batched = functorch::maybeGetBatchedImpl(t)) level = std::max(level, batched->level());
}

// A view by one call that autograd does not see, where it has nothing to see; else by `by_torch`.
template <class ByTorch>
Tensor view_of(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides, const ByTorch& by_torch) {
  if (t.requires_grad()) return by_torch();
  const at::AutoDispatchBelowADInplaceOrView below;
  return t.as_strided(sizes, strides);
}

// One call under a level of vmap.
class Fold {
 public:
  explicit Fold(int64_t level) : level_(level) {}

  Given given(const Tensor& t) {
    const auto* batched = functorch::maybeGetBatchedImpl(t);
    Given result = batched && batched->level() == level_ ? Given{batched->value(), batched->bdim()} : Given{t, std::nullopt};
    plain_ = plain_ && is_plain_on_cpu(result.value);
    if (plain_ && result.dim) count_ = result.value.size(*result.dim);
    return result;
  }
  std::vector<Given> given(at::TensorList tensors) {
    std::vector<Given> result;
    result.reserve(tensors.size());
    for (const Tensor& t : tensors) result.push_back(given(t));
    return result;
  }
  // Whether all that was given is plain, and something is vmapped.
  bool serves() const { return plain_ && count_ > 0; }
  int64_t count() const { return count_; }

  // The tensor with its rows, dimension `place` of a sample, `count` times as many. [0] stands for none.
  Tensor folded(const Given& given, int64_t place) const {
    const Tensor& t = given.value;
    if (given.sample_dims() == 1 && t.numel() == 0) return given.dim ? t.new_empty({0}) : t;
    if (given.dim) return merged(t, *given.dim, place);
    std::vector<int64_t> shape = t.sizes().vec();
    shape.insert(shape.begin() + place + 1, count_);
    return t.unsqueeze(place + 1).expand(shape).flatten(place, place + 1);
  }
  template <class Place>
  std::vector<Tensor> folded(const std::vector<Given>& given, const Place& place) const {
    std::vector<Tensor> result;
    result.reserve(given.size());
    for (const Given& one : given) result.push_back(folded(one, place(one)));
    return result;
  }

  // A result by samples; what nobody asked for, [0], is not vmapped.
  Tensor unfolded(const Tensor& t, int64_t place) const {
    if (t.dim() == 1) return t;
    auto sizes = t.sizes().vec(), strides = t.strides().vec();
    sizes[place] /= count_;
    sizes.insert(sizes.begin() + place + 1, count_);
    strides.insert(strides.begin() + place, strides[place] * count_);
    const auto by_torch = [&] { return t.unflatten(place, {t.size(place) / count_, count_}); };
    return wrapped(view_of(t, sizes, strides, by_torch), place + 1);
  }
  Tensor wrapped(const Tensor& t, int64_t dim) const { return functorch::makeBatched(t, dim, level_); }

 private:
  // t.movedim(dim, place + 1).flatten(place, place + 1)
  static Tensor merged(const Tensor& t, int64_t dim, int64_t place) {
    const auto by_torch = [&] { return t.movedim(dim, place + 1).flatten(place, place + 1); };
    auto sizes = t.sizes().vec(), strides = t.strides().vec();
    const int64_t count = sizes[dim], stride = strides[dim];
    sizes.erase(sizes.begin() + dim), strides.erase(strides.begin() + dim);
    if (sizes[place] > 1 && count > 1 && strides[place] != count * stride) return by_torch();
    if (count > 1) strides[place] = stride;
    sizes[place] *= count;
    return view_of(t, sizes, strides, by_torch);
  }

  int64_t level_, count_ = 0;
  bool plain_ = true;
};

// Whether a call has what only the rules in Python know: options of steps, rows that do not all take part, ids, weights of
// each sample, or no vmap that is under way.
bool needs_rule(const Tensor& x, at::TensorList params, at::TensorList rows, int64_t recipe) {
  const auto batched = [](const Tensor& t) { return functorch::maybeGetBatchedImpl(t) != nullptr; };
  return !rows.empty() || (recipe & kHasRows) != 0 || !x.is_floating_point() ||
         std::any_of(params.begin(), params.end(), batched) ||
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchVmapMode);
}

LayerOutputs layer_vmap(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows, int64_t recipe,
                        bool save) {
  static const auto rule = find_op<LayerSignature>("fused_rnn::layer_vmapped");
  static const auto op = find_op<LayerSignature>("fused_rnn::layer");
  if (!needs_rule(x, params, rows, recipe)) {
    int64_t level = -1;
    include_level(x, level);
    for (const Tensor& t : states) include_level(t, level);
    Fold fold(level);
    const Given given_x = fold.given(x);
    const std::vector<Given> given_states = fold.given(states);
    fold.given(params);
    if (fold.serves()) {
      const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
      auto [y, last, saved] = op.call(fold.folded(given_x, second_last(given_x)), fold.folded(given_states, second_last),
                                      params, rows, recipe, save);
      y = fold.unfolded(y, y.dim() - 2);
      for (Tensor& t : last) t = fold.unfolded(t, t.dim() - 2);
      for (Tensor& t : saved) t = fold.unfolded(t, of_saved({t, std::nullopt}));
      return {std::move(y), std::move(last), std::move(saved)};
    }
  }
  return rule.call(x, states, params, rows, recipe, save);
}

LayerGradients layer_backward_vmap(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                   at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe,
                                   std::array<bool, 3> mask) {
  static const auto rule = find_op<LayerBackwardSignature>("fused_rnn::layer_backward_vmapped");
  if (needs_rule(x, params, rows, recipe)) return rule.call(dy, dlast, x, states, params, rows, saved, recipe, mask);
  int64_t level = -1;
  include_level(x, level);
  if (dy) include_level(*dy, level);
  for (const at::TensorList& tensors : {dlast, states, saved}) {
    for (const Tensor& t : tensors) include_level(t, level);
  }
  Fold fold(level);
  const Given given_x = fold.given(x);
  const std::optional<Given> given_dy = dy ? std::optional<Given>(fold.given(*dy)) : std::nullopt;
  const std::vector<Given> given_last = fold.given(dlast), given_states = fold.given(states),
                           given_saved = fold.given(saved);
  fold.given(params);
  const auto fits = [&] {
    const CellKind cell = layer_recipe_of(recipe).cell;
    const int64_t elements = given_x.value.numel() / std::max<int64_t>(given_x.value.size(-1), 1) *
                             (given_x.dim ? 1 : fold.count()) * slot_count(cell) * params[1].size(0);
    return elements <= kMostElements;
  };
  if (!fold.serves() || params.size() < 2 || !fits()) {
    return rule.call(dy, dlast, x, states, params, rows, saved, recipe, mask);
  }
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  const OptionalTensor folded_dy = given_dy ? OptionalTensor(fold.folded(*given_dy, second_last(*given_dy))) : std::nullopt;
  auto [dx, dstates, dparams] =
      sample_backward_op().call(folded_dy, fold.folded(given_last, second_last), fold.folded(given_x, second_last(given_x)),
                                fold.folded(given_states, second_last), params, rows, fold.folded(given_saved, of_saved),
                                BackwardNumbers{recipe, mask, fold.count()}.list());
  dx = fold.unfolded(dx, dx.dim() - 2);
  for (Tensor& t : dstates) t = fold.unfolded(t, t.dim() - 2);
  if (mask[2]) {
    for (Tensor& t : dparams) t = fold.wrapped(t, 0);
  }
  return {std::move(dx), std::move(dstates), std::move(dparams)};
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  // layer and layer_backward, for the rules in Python.
  m.def(
      "layer_vmapped(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, int recipe, bool save) "
      "-> (Tensor y, Tensor[] last, Tensor[] saved)");
  m.def(
      "layer_backward_vmapped(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, int recipe, bool[3] mask) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(fused_rnn, FuncTorchBatched, m) {
  m.impl("layer", fused_rnn::layer_vmap);
  m.impl("layer_backward", fused_rnn::layer_backward_vmap);
}
