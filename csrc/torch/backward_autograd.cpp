// Autograd of the backward ops: inside backward with create_graph, and always under torch.func.grad, gradients must be
// differentiable themselves. The kernels make them, and a node of the graph keeps what they were made from; only if somebody
// differentiates them does fused_rnn::layer_double_backward (fused_rnn/_derivatives.py) run. Where the same pass
// differentiates the layer too, as a gradient penalty beside a loss does, the node leaves half of the work to the layer's
// (second_order.h).
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "torch/layer.h"
#include "torch/ops.h"
#include "torch/saved_variables.h"
#include "torch/second_order.h"
#include "torch/tangents.h"

namespace fused_rnn {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The arguments of a backward op. References live as long as the call.
struct BackwardArguments {
  const OptionalTensor& dy;
  at::TensorList dlast;
  const Tensor& x;
  at::TensorList states, params, rows, saved;
  BackwardNumbers numbers;

  at::TensorList reset_states() const {
    if (!(numbers.recipe & kHasResetStates)) return {};
    size_t masks = 0;
    for (int64_t bits = numbers.recipe & kHasRows & ~kHasResetStates; bits != 0; bits &= bits - 1) ++masks;
    return rows.slice(std::min(masks, rows.size()));
  }
};

class LayerBackwardNode final : public torch::autograd::Node {
 public:
  explicit LayerBackwardNode(const BackwardArguments& a)
      : Node(torch::autograd::collect_next_edges(tensor_of(a.dy), a.dlast, a.x, a.states, a.reset_states(), a.params)),
        dy_(a.dy, false),
        x_(a.x, false),
        dlast_(saved_variables(a.dlast)),
        states_(saved_variables(a.states)),
        params_(saved_variables(a.params)),
        rows_(saved_variables(a.rows)),
        numbers_(a.numbers) {
    const CellKind cell = layer_recipe_of(a.numbers.recipe).cell;
    const size_t before_y = saved_count(cell, (a.numbers.recipe & kHasStepOptions) != 0);
    saved_ = saved_variables(a.saved.slice(0, std::min(before_y, a.saved.size())));
    if (a.saved.size() <= before_y) return;
    // An alias that autograd does not check: if forward's output was written in between, the op makes it again.
    y_ = SavedVariable(a.saved[before_y].variable_data(), false);
    y_version_ = torch::autograd::impl::version_counter(a.saved[before_y]);
    y_version_then_ = y_version_.current_version();
    has_y_ = true;
  }

  // The layer's own node.
  void know(const NodePointer& forward) { forward_.emplace(forward); }

  variable_list apply(variable_list&& grads) override {
    static const auto op = find_op<DoubleBackwardSignature>("fused_rnn::layer_double_backward");
    std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(num_outputs());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& t) { return t.defined(); })) return result;
    const Tensor x = x_.unpack();
    const std::vector<Tensor> params = unpacked(params_);
    const Tensor none = at::empty({0}, params[0].options().requires_grad(false));
    for (Tensor& t : grads) {
      if (!t.defined()) t = none;
    }
    std::vector<Tensor> saved = unpacked(saved_);
    if (has_y_) saved.push_back(y_version_.current_version() == y_version_then_ ? y_.unpack() : none);
    if (dh_.defined()) {
      if (!has_y_) saved.push_back(none);
      saved.push_back(dh_);
    }
    const OptionalTensor dy = optional_of(dy_.unpack());
    const std::vector<Tensor> dlast = unpacked(dlast_), states = unpacked(states_), rows = unpacked(rows_);
    const NodePointer kept = forward_ ? forward_->lock() : NodePointer();
    if (ForwardNode* forward = static_cast<ForwardNode*>(kept.get()); forward && hands_over(*forward, grads)) {
      const BackwardRecord record = record_of(grads, dy, dlast, x, states, params, rows, saved, numbers_.recipe);
      const Call call = record.call();
      if (has_second_order(call) && runs_plainly(call)) {
        // Without their graph: it may lead to the node that is to keep them.
        const OptionalTensor dy_alone = dy ? OptionalTensor(dy->variable_data()) : std::nullopt;
        return handed_over(*forward, record_of(alone(grads), dy_alone, alone(dlast), x.variable_data(), alone(states),
                                               alone(params), alone(rows), alone(saved), numbers_.recipe));
      }
    }
    std::vector<int64_t> numbers = numbers_.list();
    const size_t first = numbers.size();
    for (size_t i = 0; i < num_outputs(); ++i) numbers.push_back(task_should_compute_output(i));
    const std::vector<Tensor> made = op.call(grads, dy, dlast, x, states, params, rows, saved, numbers);
    TORCH_INTERNAL_ASSERT(made.size() == result.size());
    for (size_t i = 0; i < result.size(); ++i) {
      if (numbers[first + i]) result[i] = made[i];
    }
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* one : {&dy_, &x_, &y_}) one->reset_data();
    for (std::vector<SavedVariable>* several : {&dlast_, &states_, &params_, &rows_, &saved_}) {
      for (SavedVariable& one : *several) one.reset_data();
    }
    dh_ = Tensor();
  }

  // What second_order.cpp then need not make again.
  void keep(const Tensor& dh) { dh_ = dh; }

  std::string name() const override { return "FusedRnnLayerDoubleBackward"; }

 private:
  // Whether this pass, which nobody differentiates, runs the layer's own node later, and that node leads to our arguments.
  bool hands_over(ForwardNode& forward, const variable_list& grads) {
    return !at::GradMode::is_enabled() && forward.runs_later() && same_stream(forward) &&
           leads_where(forward.next_edges()) && std::all_of(grads.begin(), grads.end(), is_plain_for_kernels);
  }

  // The engine makes streams wait for each other along the edges of the graph, and there is none between these two.
  bool same_stream(ForwardNode& forward) { return forward.stream() == stream(); }

  // Whether the layer's edges lead on for the same arguments as ours: requires_grad may have been set in between. Ours are
  // of x, states, reset states, params; the layer's of x, states, params, reset states.
  bool leads_where(const torch::autograd::edge_list& of_forward) const {
    const torch::autograd::edge_list& edges = next_edges();
    const size_t first = 1 + dlast_.size(), before = 1 + states_.size(), params = params_.size();
    const size_t resets = edges.size() - first - before - params;
    if (of_forward.size() != before + params + resets) return false;
    for (size_t i = 0; i < of_forward.size(); ++i) {
      const size_t place = i < before ? i : i < before + resets ? i + params : i - resets;
      if (edges[first + i].is_valid() != leads_on(of_forward[place])) return false;
    }
    return true;
  }
  static bool leads_on(const torch::autograd::Edge& edge) {
    if (!edge.is_valid()) return false;
    const auto* weights = dynamic_cast<const WeightNode*>(edge.function.get());
    return !weights || weights->next_edge(edge.input_nr).is_valid();
  }
  static std::vector<Tensor> alone(const std::vector<Tensor>& tensors) {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(t.defined() ? t.variable_data() : t);
    return result;
  }

  // The gradients of dy and dlast; the layer's own node makes the others.
  variable_list handed_over(ForwardNode& forward, BackwardRecord record) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto second = std::make_unique<SecondOrder>(std::move(record));
    const std::vector<Tensor> of_results = second->of_results();
    variable_list result(num_outputs());
    for (size_t i = 0; i < 1 + dlast_.size(); ++i) {
      if (task_should_compute_output(i)) result[i] = of_results[i];
    }
    if (result[0].defined())
      result[0] = result[0].clone();  // the second half reads it, and a hook may write into a gradient
    if (!forward.add(second)) add_arguments(*second, result);
    return result;
  }

  // The gradients of the arguments, by this node after all.
  void add_arguments(SecondOrder& second, variable_list& result) const {
    const size_t first = 1 + dlast_.size(), first_param = num_outputs() - params_.size();
    const auto wanted = [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) {
        if (task_should_compute_output(i)) return true;
      }
      return false;
    };
    const GradientMask mask{wanted(first, first + 1), wanted(first + 1, first_param), wanted(first_param, num_outputs())};
    const auto [dx, dstates, dparams] = second.of_arguments(std::nullopt, {}, mask);
    std::vector<Tensor> made{dx};
    made.insert(made.end(), dstates.begin(), dstates.end());
    made.insert(made.end(), dparams.begin(), dparams.end());
    TORCH_INTERNAL_ASSERT(first + made.size() == num_outputs());
    for (size_t i = first; i < num_outputs(); ++i) {
      if (task_should_compute_output(i)) result[i] = made[i - first];
    }
  }

  std::optional<WeakNodePointer> forward_;
  SavedVariable dy_, x_, y_;
  c10::VariableVersion y_version_{c10::VariableVersion::DISABLED};
  uint32_t y_version_then_ = 0;
  bool has_y_ = false;
  Tensor dh_;
  std::vector<SavedVariable> dlast_, states_, params_, rows_, saved_;
  const BackwardNumbers numbers_;
};

bool requires_grad(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

bool differentiates(const BackwardArguments& a) {
  return at::GradMode::is_enabled() &&
         (requires_grad(a.dy) || any_requires_grad(a.dlast) || a.x.requires_grad() || any_requires_grad(a.states) ||
          any_requires_grad(a.params) || any_requires_grad(a.rows));
}

bool has_tangents(const BackwardArguments& a) {
  return tangents_exist() && ((a.dy && has_tangent(*a.dy)) || any_has_tangent(a.dlast) || has_tangent(a.x) ||
                              any_has_tangent(a.states) || any_has_tangent(a.params) || any_has_tangent(a.reset_states()));
}

// Gives the gradients of a call their tangents.
void set_tangents(const BackwardArguments& a, const LayerGradients& made) {
  static const auto op = find_op<BackwardTangentsSignature>("fused_rnn::layer_backward_tangents");
  std::vector<Tensor> tangents;
  append_tangents(a.dy ? *a.dy : at::empty({0}, a.params[0].options()), tangents);
  for (const at::TensorList& tensors : {a.dlast, at::TensorList(a.x), a.states, a.reset_states(), a.params}) {
    append_tangents(tensors, tangents);
  }
  const OptionalTensor dy = a.dy ? OptionalTensor(primal_of(*a.dy)) : std::nullopt;
  const std::vector<Tensor> found = op.call(tangents, dy, primals_of(a.dlast), primal_of(a.x), primals_of(a.states),
                                            primals_of(a.params), primals_of(a.rows), primals_of(a.saved), a.numbers.list());
  size_t i = 0;
  set_tangent(std::get<0>(made), found[i++]);
  for (const std::vector<Tensor>* several : {&std::get<1>(made), &std::get<2>(made)}) {
    for (const Tensor& t : *several) set_tangent(t, found[i++]);
  }
}

// fused_rnn::layer_backward of plain tensors on a CPU whose derivative kernels have; dh goes to the node.
std::optional<LayerGradients> keeping_backward(const BackwardArguments& a, LayerBackwardNode& node) {
  const Rows rows = rows_of(a.rows, a.numbers.recipe);
  const Call call{a.x, a.states, a.params, rows, layer_recipe_of(a.numbers.recipe)};
  const auto type = a.x.scalar_type();
  const auto plain = [](const Tensor& t) { return t.is_cpu() && is_plain(t); };
  const bool projects = call.params_of_direction(0).size() > (call.recipe.has_biases ? 4u : 2u);
  if (a.numbers.samples || projects || rows.options.any() || (type != at::kFloat && type != at::kDouble) ||
      !runs_plainly_on_cpu(call) || (a.dy && !plain(*a.dy)) || !std::all_of(a.dlast.begin(), a.dlast.end(), plain)) {
    return std::nullopt;
  }
  const auto& mask = a.numbers.mask;
  auto [made, dh] =
      backward_keeping_dh(call, {a.dy, gradients_of_last(call.recipe, a.dlast), saved_of(call.recipe.cell, rows, a.saved)},
                          {mask[0], mask[1], mask[2]});
  node.keep(dh);
  return made;
}

LayerGradients backward_autograd(const BackwardArguments& a, const NodePointer& forward = {}) {
  const auto node = differentiates(a) ? make_node<LayerBackwardNode>(a) : nullptr;
  if (node && forward) static_cast<LayerBackwardNode&>(*node).know(forward);
  LayerGradients made = [&] {
    if (node) {
      if (auto gradients = keeping_backward(a, static_cast<LayerBackwardNode&>(*node))) return *std::move(gradients);
    }
    const at::AutoDispatchBelowADInplaceOrView guard;
    const BackwardNumbers& n = a.numbers;
    return n.samples ? sample_backward_op().call(a.dy, a.dlast, a.x, a.states, a.params, a.rows, a.saved, n.list())
                     : layer_backward_op().call(a.dy, a.dlast, a.x, a.states, a.params, a.rows, a.saved, n.recipe, n.mask);
  }();
  if (node) {
    torch::autograd::set_history(std::get<0>(made), node);
    for (std::vector<Tensor>* several : {&std::get<1>(made), &std::get<2>(made)}) {
      for (Tensor& t : *several) torch::autograd::set_history(t, node);
    }
  }
  if (has_tangents(a)) set_tangents(a, made);
  return made;
}

LayerGradients sample_backward_autograd(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                        at::TensorList states, at::TensorList params, at::TensorList rows,
                                        at::TensorList saved, at::IntArrayRef call) {
  return backward_autograd({dy, dlast, x, states, params, rows, saved, BackwardNumbers::of(call)});
}

LayerGradients layer_backward_autograd(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                       at::TensorList states, at::TensorList params, at::TensorList rows,
                                       at::TensorList saved, int64_t recipe, std::array<bool, 3> mask) {
  return backward_autograd({dy, dlast, x, states, params, rows, saved, {recipe, mask, /*samples=*/0}});
}

}  // namespace

LayerGradients layer_backward_of(const NodePointer& forward, const Call& call, const OptionalTensor& dy,
                                 at::TensorList dlast, at::TensorList saved, GradientMask mask) {
  const RowList rows = list_of(call.rows);
  const BackwardNumbers numbers{pack(call.recipe) | rows.bits, {mask.x, mask.states, mask.weights}, /*samples=*/0};
  return backward_autograd({dy, dlast, call.x, call.states, call.params, rows.tensors, saved, numbers}, forward);
}

}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  m.impl("layer_backward", fused_rnn::layer_backward_autograd);
  m.impl("layer_backward_samples", fused_rnn::sample_backward_autograd);
}
