// Autograd of the layer op: the node of the graph that forward makes, and what it keeps for backward.
//
// A user may write into the output y (h[done] = 0 between steps, y += x) before backward runs. So the node keeps y as an
// alias that autograd does not check, together with y's version: if y was written meanwhile, backward makes it again by
// forward from the arguments. Arguments are unpacked, which raises for one that was written in place, only where a gradient
// that is asked for depends on their values.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <memory>
#include <unordered_map>

#include "torch/ops.h"
#include "torch/saved_variables.h"
#include "torch/second_order.h"
#include "torch/tangents.h"

namespace fused_rnn {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The tensor that was saved, whether or not it was written since. For its shape and dtype alone.
Tensor unchecked(const SavedVariable& saved) {
  const auto raw = saved.get_raw_data();
  return raw && raw->defined() ? *raw : saved.unpack();  // raises after backward has freed it
}

class LayerNode final : public ForwardNode {
 public:
  explicit LayerNode(const Call& call)
      : x_(call.x, false),
        states_(saved_variables(call.states)),
        params_(saved_variables(call.params)),
        offsets_(call.rows.offsets, false),
        lengths_(owned(call.rows.lengths)),
        resets_(owned(call.rows.resets)),
        reset_states_(saved_variables(call.rows.reset_states)),
        options_(saved_options(call.rows.options)),
        recipe_(call.recipe) {
    const Tensor& steps = call.rows.offsets ? *call.rows.offsets : call.x;
    one_step_ = (steps.sym_size(0) - (call.rows.offsets ? 1 : 0)).maybe_as_int() == 1;
    torch::autograd::edge_list edges = torch::autograd::collect_next_edges(call.x, call.states);
    if (const NodePointer weights = WeightNode::of(call, one_step_)) {
      for (size_t i = 0; i < call.params.size(); ++i) edges.emplace_back(weights, i);
      weights_ = static_cast<WeightNode*>(weights.get());
    } else {
      const auto to_weights = torch::autograd::collect_next_edges(call.params);
      edges.insert(edges.end(), to_weights.begin(), to_weights.end());
    }
    const auto to_resets = torch::autograd::collect_next_edges(call.rows.reset_states);
    edges.insert(edges.end(), to_resets.begin(), to_resets.end());
    set_next_edges(std::move(edges));
  }

  void keep(const LayerOutputs& out, bool weight_gradients) {
    const Tensor& y = std::get<0>(out);
    saved_ = saved_variables(std::get<2>(out));
    const std::vector<Tensor>& last = std::get<1>(out);
    // An alias, since a node must not own its results; writing into the c that the caller has is an error of backward.
    const size_t states = state_count(recipe_.cell);
    if (last.size() > states) saved_.emplace_back(last[states].detach(), false);
    if (!backward_reads_output(recipe_.cell, one_step_ ? 1 : 2, weight_gradients)) return;
    y_ = SavedVariable(y.variable_data(), false);
    y_version_ = torch::autograd::impl::version_counter(y);
    y_version_then_ = y_version_.current_version();
    has_y_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Seconds seconds = take_seconds();
    passes_.add(torch::autograd::get_current_graph_task_id());
    const bool any = std::any_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); });
    const GradientMask mask = wanted();
    variable_list result(num_outputs());
    if (!(mask.x || mask.states || mask.weights)) return result;
    const bool together = !seconds.empty() && are_plain(grads);  // the first of them makes our gradients too
    if (any && !together) result = own_gradients(grads, mask);
    for (const std::unique_ptr<SecondOrder>& second : seconds) {
      const at::AutoDispatchBelowADInplaceOrView guard;
      const bool with_ours = together && second == seconds.front();
      std::vector<OptionalTensor> of_last;
      for (size_t i = 0; with_ours && i < last_count(recipe_); ++i) of_last.push_back(optional_of(grads[1 + i]));
      const variable_list more =
          in_order(second->of_arguments(with_ours ? optional_of(grads[0]) : std::nullopt, std::move(of_last), mask), mask);
      for (size_t i = 0; i < more.size(); ++i) {
        if (more[i].defined()) result[i] = result[i].defined() ? result[i] + more[i] : more[i];
      }
    }
    return result;
  }

  // The engine runs the node created last first, on one thread for all nodes of a device: nodes of a layer's backward, and
  // what is made of their results, run before the layer's own. It may be otherwise where several threads make a graph.
  bool runs_later() override {
    const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
    if (!nodes || nodes->count(this) == 0) return false;
    const auto* wanted = torch::autograd::get_current_graph_task_exec_info();
    if (wanted && !wanted->empty()) {
      const auto found = wanted->find(this);
      if (found == wanted->end() || !found->second.needed_) return false;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    return passes_.is_new(torch::autograd::get_current_graph_task_id());
  }

  bool add(std::unique_ptr<SecondOrder>& second) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const int pass = torch::autograd::get_current_graph_task_id();
    if (!passes_.is_new(pass)) return false;
    seconds_[pass].push_back(std::move(second));
    return true;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* one : {&x_, &offsets_, &y_}) one->reset_data();
    for (std::vector<SavedVariable>* several : {&states_, &params_, &saved_, &reset_states_, &options_}) {
      for (SavedVariable& one : *several) one.reset_data();
    }
    lengths_ = resets_ = Tensor();
  }

  std::string name() const override { return "FusedRnnLayerBackward"; }

 private:
  struct Arguments {
    Tensor x;
    std::vector<Tensor> states, params;
  };

  using Seconds = std::vector<std::unique_ptr<SecondOrder>>;

  // Numbers of backward passes, which only grow. Of many the oldest are forgotten, and then no pass before them is new.
  class Passes {
   public:
    void add(int pass) {
      if (last_.size() == kMost) {
        const auto oldest = std::min_element(last_.begin(), last_.end());
        forgotten_ = std::max(forgotten_, *oldest);
        last_.erase(oldest);
      }
      last_.push_back(pass);
    }
    bool is_new(int pass) const { return pass > forgotten_ && std::find(last_.begin(), last_.end(), pass) == last_.end(); }

   private:
    static constexpr size_t kMost = 8;
    c10::SmallVector<int, kMost> last_;
    int forgotten_ = -1;
  };

  // Those of this pass.
  Seconds take_seconds() {
    const auto found = seconds_.find(torch::autograd::get_current_graph_task_id());
    if (found == seconds_.end()) return {};
    Seconds taken = std::move(found->second);
    seconds_.erase(found);
    return taken;
  }

  // The gradients of the layer's arguments from those of its results, without its backward's.
  variable_list own_gradients(const variable_list& grads, GradientMask mask) {
    // Unpacks every argument if gradients will be differentiated or y must be recomputed.
    const Arguments a = at::GradMode::is_enabled() || written() ? all_arguments() : arguments(mask);
    const Rows rows{optional_of(lengths_), optional_of(offsets_.unpack()), optional_of(resets_),
                    std::nullopt,          unpacked(reset_states_),        options()};
    const Call call{a.x, a.states, a.params, rows, recipe_};
    std::vector<Tensor> saved = unpacked(saved_);
    if (has_y_) saved.push_back(written() ? output_again(call) : output());
    States dlast(grads.begin() + 1, grads.begin() + 1 + last_count(recipe_));
    if (std::none_of(dlast.begin(), dlast.end(), [](const Tensor& t) { return t.defined(); })) dlast.clear();
    for (Tensor& t : dlast) {
      // at::empty goes through the dispatcher, which gives a fake tensor under fake tensors. Its options are the call's:
      // hooks of checkpointing allow x_ one unpack in a backward.
      if (!t.defined()) t = at::empty({0}, call.like().options());
    }
    const OptionalTensor dy = optional_of(grads[0]);
    const bool plainly = are_plain(grads) && runs_plainly(call);
    if (plainly && at::GradMode::is_enabled()) {
      return in_order(layer_backward_of(getptr(), call, dy, dlast, saved, mask), mask);
    }
    // Called outside of a backward pass (grad_fn(...) from Python), nobody would run the other node.
    const bool in_pass = torch::autograd::get_current_graph_task_id() >= 0;
    if (plainly && mask.weights && weights_ && in_pass && runs_plainly_on_cpu(call)) {
      const ResultGradients given{dy, gradients_of_last(recipe_, dlast), saved_of(recipe_.cell, rows, saved)};
      return in_order(step_backward_on_cpu(call, given, mask, *weights_), {mask.x, mask.states, /*weights=*/false});
    }
    const RowList list = list_of(rows);
    return in_order(layer_backward_op().call(dy, dlast, call.x, call.states, call.params, list.tensors, saved,
                                             pack(recipe_) | list.bits, {mask.x, mask.states, mask.weights}),
                    mask);
  }

  // As the node's edges are.
  variable_list in_order(const LayerGradients& gradients, GradientMask mask) const {
    const auto& [dx, dstates, dparams] = gradients;
    variable_list result(1 + states_.size() + params_.size() + reset_states_.size());
    if (mask.x) result[0] = dx;
    const auto own = dstates.begin() + states_.size();
    if (mask.states) std::copy(dstates.begin(), own, result.begin() + 1);
    if (mask.weights) std::copy(dparams.begin(), dparams.end(), result.begin() + 1 + states_.size());
    if (mask.states) std::copy(own, dstates.end(), result.end() - reset_states_.size());
    return result;
  }

  // The gradients that this run of backward asks for.
  GradientMask wanted() const {
    GradientMask mask{task_should_compute_output(0), false, false};
    size_t i = 1;
    for (; i <= states_.size(); ++i) mask.states = mask.states || task_should_compute_output(i);
    for (; i <= states_.size() + params_.size(); ++i) mask.weights = mask.weights || task_should_compute_output(i);
    for (; i < num_outputs(); ++i) mask.states = mask.states || task_should_compute_output(i);
    return mask;
  }

  // Empty without options; else one variable for each option, undefined where the option is not given. Saved variables,
  // because checkpointing recomputes those.
  static std::vector<SavedVariable> saved_options(StepOptions options) {
    std::vector<Tensor> tensors;
    if (!options.any()) return {};
    for (const OptionalTensor* t : options.all()) tensors.push_back(tensor_of(*t));
    return saved_variables(tensors);
  }
  StepOptions options() const {
    StepOptions result;
    for (size_t i = 0; i < options_.size(); ++i) *result.all()[i] = optional_of(options_[i].unpack());
    return result;
  }

  Arguments all_arguments() const { return {x_.unpack(), unpacked(states_), unpacked(params_)}; }

  // Unpacks what the gradients depend on; the others for their shapes alone.
  Arguments arguments(GradientMask mask) const {
    const auto get = [](const SavedVariable& saved, bool check) { return check ? saved.unpack() : unchecked(saved); };
    Arguments a{get(x_, mask.weights), {}, {}};
    for (size_t i = 0; i < states_.size(); ++i) {
      a.states.push_back(get(states_[i], i > 0 || mask.weights || traits_of(recipe_.cell).reads_h));
    }
    const size_t per_direction = params_.size() / recipe_.directions();
    for (size_t i = 0; i < params_.size(); ++i) {
      const size_t place = i % per_direction;
      const bool bias = recipe_.has_biases && (place == 2 || place == 3);
      const bool recurrent = place == 1 && one_step_ && !mask.states;  // then no gradient passes through W_hh
      a.params.push_back(get(params_[i], !(bias || recurrent || (place == 0 && !mask.x))));
    }
    return a;
  }

  static bool are_plain(const variable_list& grads) {
    return std::all_of(grads.begin(), grads.end(), [](const Tensor& t) { return !t.defined() || is_plain_for_kernels(t); });
  }

  // Whether y was written since forward.
  bool written() const { return has_y_ && y_version_.current_version() != y_version_then_; }

  // With the version of the y that the caller has, where backward's own node keeps it and is to know of a later edit.
  Tensor output() const {
    const Tensor y = y_.unpack();
    if (!at::GradMode::is_enabled()) return y;
    const Tensor alias = y.detach();
    torch::autograd::impl::set_version_counter(alias, y_version_);
    return alias;
  }

  static Tensor output_again(const Call& call) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return std::get<0>(call_layer(call, /*save=*/false));
  }

  SavedVariable x_, y_;
  std::vector<SavedVariable> states_, params_, saved_;
  SavedVariable offsets_;
  Tensor lengths_, resets_;
  std::vector<SavedVariable> reset_states_, options_;
  c10::VariableVersion y_version_{c10::VariableVersion::DISABLED};
  uint32_t y_version_then_ = 0;
  bool has_y_ = false, one_step_ = false;
  WeightNode* weights_ = nullptr;  // owned by the edges that lead to it, or none
  const Recipe recipe_;
  std::unordered_map<int, Seconds> seconds_;  // by the pass
  Passes passes_;                             // that have run the node
};

bool has_tangents(const Call& call) {
  return tangents_exist() && (has_tangent(call.x) || any_has_tangent(call.states) || any_has_tangent(call.params) ||
                              any_has_tangent(call.rows.reset_states));
}

// Gives the results of a call their tangents.
void set_tangents(const Call& call, const LayerOutputs& out) {
  static const auto op = find_op<LayerTangentsSignature>("fused_rnn::layer_tangents");
  std::vector<Tensor> tangents;
  for (const at::TensorList& tensors :
       {at::TensorList(call.x), call.states, at::TensorList(call.rows.reset_states), call.params}) {
    append_tangents(tensors, tangents);
  }
  Rows primals = call.rows;
  primals.reset_states = primals_of(call.rows.reset_states);
  const RowList rows = list_of(primals);
  const auto& [y, last, of_forward] = out;
  std::vector<Tensor> saved = of_forward;
  const size_t states = state_count(call.recipe.cell);
  if (last.size() > states && !saved.empty()) saved.push_back(last[states]);
  const std::vector<Tensor> made = op.call(tangents, y, primal_of(call.x), primals_of(call.states), primals_of(call.params),
                                           rows.tensors, saved, pack(call.recipe) | rows.bits);
  set_tangent(y, made[0]);
  for (size_t i = 0; i < last.size(); ++i) set_tangent(last[i], made[1 + i]);
}

LayerOutputs layer_autograd(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                            int64_t recipe, bool save) {
  const Rows given = rows_of(rows, recipe);
  const Call call{x, states, params, given, layer_recipe_of(recipe)};
  const bool dual = has_tangents(call);
  const bool differentiate = differentiates(call);
  const auto node = differentiate ? make_node<LayerNode>(call) : nullptr;
  LayerOutputs out = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_layer(call, save || differentiate || (dual && x.is_cpu()));  // what the tangents are made of
  }();
  if (node) {
    static_cast<LayerNode*>(node.get())->keep(out, any_requires_grad(params));
    torch::autograd::set_history(std::get<0>(out), node);
    for (Tensor& t : std::get<1>(out)) torch::autograd::set_history(t, node);
  }
  if (dual) set_tangents(call, out);
  if (!save) std::get<2>(out).clear();
  return out;
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) { m.impl("layer", fused_rnn::layer_autograd); }
