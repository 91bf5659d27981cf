// Autograd of a layer's tangents, J v. Both its derivatives are ops that exist: by v it is the layer's backward, J^T u, and
// by the layer's arguments that of <u, J v> = <v, J^T u>, which is the derivative of the backward.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "torch/ops.h"
#include "torch/saved_variables.h"
#include "torch/tangents.h"
#include "torch/weight_node.h"

namespace fused_rnn {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The arguments of the op. References live as long as the call.
struct JvpArguments {
  at::TensorList tangents;
  const Tensor& x;
  at::TensorList states, params, rows, saved;
  int64_t recipe, samples;

  std::vector<Tensor> reset_states() const { return rows_of(rows, recipe).reset_states; }
};

class LayerJvpNode final : public torch::autograd::Node {
 public:
  explicit LayerJvpNode(const JvpArguments& a)
      : Node(torch::autograd::collect_next_edges(a.tangents, a.x, a.states, at::TensorList(a.reset_states()), a.params)),
        x_(a.x, false),
        tangents_(saved_variables(a.tangents)),
        states_(saved_variables(a.states)),
        params_(saved_variables(a.params)),
        rows_(saved_variables(a.rows)),
        recipe_(a.recipe),
        samples_(a.samples) {
    // Without their graph: they follow from the other arguments, and y has our results as its tangents.
    for (const Tensor& t : a.saved) {
      saved_.emplace_back(t.variable_data(), false);
      versions_.push_back(torch::autograd::impl::version_counter(t));
      then_.push_back(versions_.back().current_version());
    }
  }

  variable_list apply(variable_list&& grads) override {
    static const auto second = find_op<DoubleBackwardSignature>("fused_rnn::layer_double_backward");
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(num_outputs());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) return result;
    for (size_t i = 0; i < versions_.size(); ++i) {
      TORCH_CHECK(versions_[i].current_version() == then_[i],
                  "fused_rnn: a result of a layer has been written in place, and the derivative of its tangents needs it");
    }
    const Tensor x = x_.unpack();
    const std::vector<Tensor> params = unpacked(params_), states = unpacked(states_), rows = unpacked(rows_),
                              saved = unpacked(saved_), tangents = unpacked(tangents_);
    const OptionalTensor dy = optional_of(grads[0]);
    std::vector<Tensor> dlast(grads.begin() + 1, grads.end());
    if (std::none_of(dlast.begin(), dlast.end(), [](const Tensor& t) { return t.defined(); })) dlast.clear();
    for (Tensor& t : dlast) {
      if (!t.defined()) t = at::empty({0}, x.options().requires_grad(false));
    }
    const size_t count = tangents.size(), first_param = count - params.size();
    const auto wanted = [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        if (task_should_compute_output(i)) return true;
      }
      return false;
    };
    if (wanted(0, count)) {
      const BackwardNumbers numbers{recipe_, {wanted(0, 1), wanted(1, first_param), wanted(first_param, count)}, samples_};
      const auto [dx, dstates, dparams] =
          samples_ ? sample_backward_op().call(dy, dlast, x, states, params, rows, saved, numbers.list())
                   : layer_backward_op().call(dy, dlast, x, states, params, rows, saved, recipe_, numbers.mask);
      size_t i = 0;
      const auto add = [&](const Tensor& t) {
        if (task_should_compute_output(i)) result[i] = t;
        ++i;
      };
      add(dx);
      for (const Tensor& t : dstates) add(t);
      for (const Tensor& t : dparams) add(t);
    }
    if (wanted(count, num_outputs())) {
      std::vector<int64_t> numbers = BackwardNumbers{recipe_, {true, true, true}, samples_}.list();
      const size_t results = 1 + dlast.size();
      numbers.resize(numbers.size() + results, 0);
      for (size_t i = count; i < num_outputs(); ++i) numbers.push_back(task_should_compute_output(i));
      const std::vector<Tensor> made = second.call(tangents, dy, dlast, x, states, params, rows, saved, numbers);
      TORCH_INTERNAL_ASSERT(made.size() == results + count);
      for (size_t i = 0; i < count; ++i) {
        if (task_should_compute_output(count + i)) result[count + i] = made[results + i];
      }
    }
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (std::vector<SavedVariable>* several : {&tangents_, &states_, &params_, &rows_, &saved_}) {
      for (SavedVariable& one : *several) one.reset_data();
    }
  }

  std::string name() const override { return "FusedRnnLayerJvpBackward"; }

 private:
  SavedVariable x_;
  std::vector<SavedVariable> tangents_, states_, params_, rows_, saved_;
  std::vector<c10::VariableVersion> versions_;
  std::vector<uint32_t> then_;
  const int64_t recipe_, samples_;
};

std::vector<Tensor> layer_jvp_autograd(at::TensorList tangents, const Tensor& x, at::TensorList states,
                                       at::TensorList params, at::TensorList rows, at::TensorList saved,
                                       at::IntArrayRef call) {
  static const auto op = find_op<LayerJvpSignature>("fused_rnn::layer_jvp");
  TORCH_CHECK_VALUE(call.size() == 2, "call: expected a recipe and samples, got ", call.size(), " numbers");
  const JvpArguments a{tangents, x, states, params, rows, saved, call[0], call[1]};
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tangents_exist() || !(any_has_tangent(tangents) || has_tangent(x) || any_has_tangent(states) ||
                             any_has_tangent(params) || any_has_tangent(rows)),
      "fused_rnn::layer_jvp has no jvp: fused_rnn/_tangents.py has tangents of tangents");
  const bool differentiates =
      at::GradMode::is_enabled() && (x.requires_grad() || any_requires_grad(tangents) || any_requires_grad(states) ||
                                     any_requires_grad(params) || any_requires_grad(rows));
  const NodePointer node = differentiates ? make_node<LayerJvpNode>(a) : nullptr;
  std::vector<Tensor> made = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(tangents, x, states, params, rows, saved, call);
  }();
  if (node) {
    for (Tensor& t : made) torch::autograd::set_history(t, node);
  }
  return made;
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) { m.impl("layer_jvp", fused_rnn::layer_jvp_autograd); }
