// Autograd of the layer op: the node of the graph that forward makes, and what it keeps for backward.
//
// A user may write into the output y (h[done] = 0 between steps, y += x) before backward runs. So the node keeps y as an
// alias that autograd does not check, together with y's version: if y was written meanwhile, backward makes it again by
// forward from the arguments. Arguments are unpacked, which raises for one that was written in place, only where a gradient
// that is asked for depends on their values.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "torch/differentiable.h"
#include "torch/layer.h"
#include "torch/ops.h"

namespace fused_rnn {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

auto& layer_backward_differentiable_op() {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("fused_rnn::layer_backward_differentiable", "")
                       .typed<LayerBackwardSignature>();
  return op;
}

// The tensor that was saved, whether or not it was written since. For its shape and dtype alone.
Tensor unchecked(const SavedVariable& saved) {
  const auto raw = saved.get_raw_data();
  return raw && raw->defined() ? *raw : saved.unpack();  // raises after backward has freed it
}

class LayerNode final : public torch::autograd::Node {
 public:
  explicit LayerNode(const LayerInputs& in) : has_biases_(in.has_biases), bidirectional_(in.bidirectional), cell_(in.cell) {
    x_ = SavedVariable(in.x, false);
    h0_ = SavedVariable(in.h0, false);
    c0_ = SavedVariable(in.c0, false);
    params_.reserve(in.params.size());
    for (const Tensor& t : in.params) params_.emplace_back(t, false);
    offsets_ = SavedVariable(in.offsets, false);
    lengths_ = own(in.lengths);
    resets_ = own(in.resets);
    has_h0_ = in.h0 && in.h0->defined();
    has_c0_ = in.c0 && in.c0->defined();
    const auto steps = (in.offsets ? in.offsets->sym_size(0) - 1 : in.x.sym_size(0)).maybe_as_int();
    one_step_ = steps == 1;
  }

  void keep(const LayerOutputs& out, bool weight_gradients) {
    const auto& [y, h_n, c_n, gates, cs] = out;
    gates_ = SavedVariable(gates, false);
    cs_ = SavedVariable(cs, false);
    if (!backward_reads_output(cell_, one_step_ ? 1 : 2, weight_gradients)) return;
    y_ = SavedVariable(y.variable_data(), false);
    y_version_ = torch::autograd::impl::version_counter(y);
    y_version_then_ = y_version_.current_version();
    has_y_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(3 + params_.size());
    const bool any = std::any_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); });
    const GradientMask mask = wanted();
    if (!any || !(mask.x || mask.state || mask.weights)) return result;
    const bool has_c = traits_of(cell_).has_c;
    // All of them also where gradients are to be differentiated, and to make y again.
    const Arguments a = at::GradMode::is_enabled() || written() ? all_arguments() : arguments(mask);
    const OptionalTensor y = has_y_ ? optional_of(output(a)) : std::nullopt;
    auto [dx, dh0, dc0, dparams] = layer_backward_op().call(
        optional_of(grads[0]), optional_of(grads[1]), has_c ? optional_of(grads[2]) : std::nullopt, a.x, a.h0, a.c0,
        a.params, has_biases_, optional_of(lengths_), optional_of(offsets_.unpack()), optional_of(resets_), y,
        gates_.unpack(), cs_.unpack(), static_cast<int64_t>(cell_), bidirectional_, {mask.x, mask.state, mask.weights});
    if (mask.x) result[0] = dx;
    if (mask.state && has_h0_) result[1] = dh0;
    if (mask.state && has_c0_) result[2] = dc0;
    if (mask.weights) std::copy(dparams.begin(), dparams.end(), result.begin() + 3);
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&x_, &h0_, &c0_, &offsets_, &y_, &gates_, &cs_}) saved->reset_data();
    for (SavedVariable& saved : params_) saved.reset_data();
    lengths_ = resets_ = Tensor();
  }

  std::string name() const override { return "FusedRnnLayerBackward"; }

 private:
  struct Arguments {
    Tensor x;
    OptionalTensor h0, c0;
    std::vector<Tensor> params;
  };

  // The gradients that this run of backward asks for.
  GradientMask wanted() const {
    GradientMask mask{task_should_compute_output(0),
                      (has_h0_ && task_should_compute_output(1)) || (has_c0_ && task_should_compute_output(2)), false};
    for (size_t i = 0; i < params_.size(); ++i) mask.weights = mask.weights || task_should_compute_output(3 + i);
    return mask;
  }

  Arguments all_arguments() const {
    Arguments a{x_.unpack(), optional_of(h0_.unpack()), optional_of(c0_.unpack()), {}};
    for (const SavedVariable& t : params_) a.params.push_back(t.unpack());
    return a;
  }

  // Unpacks what the gradients depend on; the others for their shapes alone.
  Arguments arguments(GradientMask mask) const {
    const auto get = [](const SavedVariable& saved, bool check) { return check ? saved.unpack() : unchecked(saved); };
    Arguments a{get(x_, mask.weights),
                optional_of(get(h0_, mask.weights || traits_of(cell_).reads_h)),
                optional_of(c0_.unpack()),
                {}};
    const size_t per_direction = params_.size() / (bidirectional_ ? 2 : 1);
    for (size_t i = 0; i < params_.size(); ++i) {
      const size_t place = i % per_direction;
      const bool bias = has_biases_ && (place == 2 || place == 3);
      const bool recurrent = place == 1 && one_step_ && !mask.state;  // then no gradient passes through W_hh
      a.params.push_back(get(params_[i], !(bias || recurrent || (place == 0 && !mask.x))));
    }
    return a;
  }

  // Whether y was written since forward.
  bool written() const { return has_y_ && y_version_.current_version() != y_version_then_; }

  // Forward's y, made again if it was written.
  Tensor output(const Arguments& a) const {
    if (!written()) return y_.unpack();
    const at::AutoDispatchBelowADInplaceOrView guard;
    return std::get<0>(layer_op().call(a.x, a.h0, a.c0, a.params, has_biases_, optional_of(lengths_),
                                       optional_of(offsets_.unpack()), optional_of(resets_), static_cast<int64_t>(cell_),
                                       bidirectional_, /*save=*/false));
  }

  SavedVariable x_, h0_, c0_, offsets_, y_, gates_, cs_;
  std::vector<SavedVariable> params_;
  Tensor lengths_, resets_;
  c10::VariableVersion y_version_{c10::VariableVersion::DISABLED};
  uint32_t y_version_then_ = 0;
  bool has_y_ = false, has_h0_ = false, has_c0_ = false, one_step_ = false;
  const bool has_biases_, bidirectional_;
  const CellKind cell_;
};

// torch 2.11 counts the references of a node by std::shared_ptr, torch 2.13 in the node itself.
template <class T, class Pointer = decltype(torch::autograd::Edge::function), class... Args>
Pointer make_node(const Args&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(new T(args...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(args...);
  }
}

bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

bool has_tangents(const LayerInputs& in) {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) &&
         (has_tangent(in.x) || (in.h0 && has_tangent(*in.h0)) || (in.c0 && has_tangent(*in.c0)) ||
          std::any_of(in.params.begin(), in.params.end(), has_tangent));
}

LayerOutputs layer_autograd(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                            bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                            const OptionalTensor& resets, int64_t cell, bool bidirectional, bool save) {
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, cell_of(cell), bidirectional};
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangents(in),
                              "fused_rnn::layer has no jvp: forward-mode AD runs on the reference, by "
                              "fused_rnn's modules and functions");
  const bool differentiate = differentiates(x, h0, c0, params);
  const auto node = differentiate ? make_node<LayerNode>(in) : nullptr;
  if (node) node->set_next_edges(torch::autograd::collect_next_edges(x, h0, c0, params));
  LayerOutputs out = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return layer_op().call(x, h0, c0, params, has_biases, lengths, offsets, resets, cell, bidirectional,
                           save || differentiate);
  }();
  if (!node) return out;
  static_cast<LayerNode*>(node.get())->keep(out, any_requires_grad(params));
  torch::autograd::set_history(std::get<0>(out), node);
  torch::autograd::set_history(std::get<1>(out), node);
  if (traits_of(in.cell).has_c) torch::autograd::set_history(std::get<2>(out), node);
  if (!save) std::get<3>(out) = std::get<4>(out) = empty_like(x, {0});
  return out;
}

// Inside backward with create_graph the gradients must be differentiable themselves: they are then made by the composite
// in fused_rnn/_ops.py, which runs the reference once more under autograd.
LayerGradients layer_backward_autograd(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                       const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                       at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                       const OptionalTensor& offsets, const OptionalTensor& resets, const OptionalTensor& y,
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

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  m.impl("layer", fused_rnn::layer_autograd);
  m.impl("layer_backward", fused_rnn::layer_backward_autograd);
}
