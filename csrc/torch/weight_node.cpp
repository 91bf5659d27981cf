#include "torch/weight_node.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <unordered_map>

#include "core/cells.h"
#include "torch/ops.h"
#include "torch/products.h"

namespace fused_rnn {
namespace {

using torch::autograd::variable_list;

// Rows are copied until there are so many. Then one product adds them to the sums: with 256 rows a product takes longer than
// reading and writing the sums does.
constexpr int64_t kRows = 256;
constexpr int64_t kElementsOfCall = 16 * 1024;  // that can be copied in the time of calling a product

// The sums of one backward pass, and rows that are not in them yet.
class WeightSums {
 public:
  WeightSums(CellKind cell, int64_t H, bool has_biases) : cell_(cell), H_(H), has_biases_(has_biases) {}

  void add(const WeightGradientRows& rows) {
    const int64_t count = rows.x.size(0);
    if (used_ + count > kRows) add_waiting();
    if (count == 0 || !gains_from_waiting(rows)) {
      add_to_sums(rows.x, rows.h, rows.d_gates);
      return;
    }
    if (!x_.defined()) {
      x_ = empty_inside(rows.x, {kRows, rows.x.size(1)});
      h_ = empty_inside(rows.x, {kRows, H_});
      d_gates_ = empty_inside(rows.x, {kRows, rows.d_gates.size(1)});
    }
    part(x_, 0, used_, used_ + count).copy_(rows.x);
    part(d_gates_, 0, used_, used_ + count).copy_(rows.d_gates);
    const Tensor h = part(h_, 0, used_, used_ + count);
    rows.h.defined() ? h.copy_(rows.h) : h.zero_();
    used_ += count;
  }

  // The gradients of W_ih, W_hh, b_ih, b_hh.
  variable_list finish(at::ScalarType type) {
    add_waiting();
    for (Tensor& sum : sums_) sum = sum.to(type);
    if (has_biases_ && sums_.size() == 3) sums_.push_back(sums_[2].clone());
    return std::move(sums_);
  }

 private:
  // Whether copying rows is less memory traffic than a product of their own, which reads and writes the sums. Together
  // kRows rows need one product: the share of these rows in it is theirs either way.
  bool gains_from_waiting(const WeightGradientRows& rows) const {
    const int64_t count = rows.x.size(0), inputs = rows.x.size(1) + H_, sums = gate_count(cell_) * H_ * inputs;
    const int64_t copied = count * (inputs + rows.d_gates.size(1));
    return 2 * count <= kRows && copied <= sums * (kRows - count) / kRows + kElementsOfCall;
  }

  void add_waiting() {
    if (used_ == 0) return;
    add_to_sums(part(x_, 0, 0, used_), part(h_, 0, 0, used_), part(d_gates_, 0, 0, used_));
    used_ = 0;
  }

  // Sums of 16-bit gradients are float, and rounded once.
  void add_to_sums(const Tensor& x, const Tensor& h, const Tensor& d_gates) {
    const int64_t G = gate_count(cell_), S = slot_count(cell_);
    const bool first = sums_.empty();
    if (first) {
      const auto options = x.options().dtype(x.element_size() == 2 ? at::kFloat : x.scalar_type());
      sums_ = {at::empty({G * H_, x.size(1)}, options), at::empty({G * H_, H_}, options)};
      // The gradient of b_hh is that of b_ih, unless the cell has a slot of its own for it.
      for (int64_t i = 0; has_biases_ && i < (S > G ? 2 : 1); ++i) sums_.push_back(at::empty({G * H_}, options));
    }
    const Tensor none;
    const bool add = !first;
    input_weight_gradients(cell_, x, d_gates, sums_[0], has_biases_ ? sums_[2] : none, add);
    const Tensor d_rg = part(d_gates, 1, (S - G) * H_, S * H_);
    if (h.defined()) {
      multiply_into(sums_[1], d_rg, /*transposed=*/true, h, add);
    } else if (first) {
      sums_[1].zero_();
    }
    if (sums_.size() == 4) sum_rows_into(sums_[3], d_rg, add);
  }

  const CellKind cell_;
  const int64_t H_;
  const bool has_biases_;
  Tensor x_, h_, d_gates_;  // [kRows, .]
  int64_t used_ = 0;        // of their rows
  variable_list sums_;
};

class SummingNode final : public WeightNode {
 public:
  explicit SummingNode(const Call& call)
      : cell_(call.recipe.cell),
        H_(call.params[1].size(1)),
        has_biases_(call.recipe.has_biases),
        type_(call.params[0].scalar_type()) {
    for (const Tensor& t : call.params) add_input_metadata(t);
    set_next_edges(torch::autograd::collect_next_edges(call.params));
  }

  void add(const WeightGradientRows& rows) override {
    std::lock_guard<std::mutex> lock(mutex_);
    sums_.try_emplace(torch::autograd::get_current_graph_task_id(), cell_, H_, has_biases_).first->second.add(rows);
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sums_.find(torch::autograd::get_current_graph_task_id());
    if (found == sums_.end()) return std::move(grads);
    variable_list result = [&] {
      const at::AutoDispatchBelowADInplaceOrView guard;
      return found->second.finish(type_);
    }();
    sums_.erase(found);
    for (size_t i = 0; i < result.size(); ++i) {
      if (grads[i].defined()) result[i] = result[i] + grads[i];
    }
    return result;
  }

  std::string name() const override { return "FusedRnnWeightsBackward"; }

  // Whether the node's edges lead to these weights as they are now.
  bool leads_to(at::TensorList params) const {
    if (params.size() != num_outputs()) return false;
    for (size_t i = 0; i < params.size(); ++i) {
      if (!params[i].requires_grad() ||
          torch::autograd::impl::try_get_grad_accumulator(params[i]) != next_edge(i).function) {
        return false;
      }
    }
    return true;
  }
  bool is_of(CellKind cell) const { return cell_ == cell; }

 private:
  const CellKind cell_;
  const int64_t H_;
  const bool has_biases_;
  const at::ScalarType type_;
  std::mutex mutex_;                          // backward passes of several threads may run the node
  std::unordered_map<int, WeightSums> sums_;  // by the pass
};

// The nodes of this thread's calls, while something else holds them.
class KnownNodes {
 public:
  NodePointer get(const Call& call) {
    const void* key = call.params[0].unsafeGetTensorImpl();
    const auto found = nodes_.find(key);
    if (found != nodes_.end()) {
      if (NodePointer node = found->second.lock()) {
        const auto& summing = static_cast<const SummingNode&>(*node);
        if (summing.is_of(call.recipe.cell) && summing.leads_to(call.params)) return node;
      }
      nodes_.erase(found);
    }
    if (nodes_.size() >= limit_) forget_dead();
    NodePointer node = make_node<SummingNode>(call);
    nodes_.emplace(key, WeakNodePointer(node));
    return node;
  }

 private:
  static constexpr size_t kFewest = 64;

  void forget_dead() {
    for (auto it = nodes_.begin(); it != nodes_.end();) it = it->second.lock() ? std::next(it) : nodes_.erase(it);
    limit_ = std::max(kFewest, 2 * nodes_.size());
  }

  std::unordered_map<const void*, WeakNodePointer> nodes_;  // by W_ih
  size_t limit_ = kFewest;
};

}  // namespace

NodePointer WeightNode::of(const Call& call, bool one_step) {
  if (!one_step || call.has_ids() || !call.rows.plain() || call.recipe.bidirectional || !runs_plainly_on_cpu(call))
    return nullptr;
  const size_t expected = call.recipe.has_biases ? 4 : 2;  // no projection
  const auto is_trained_leaf = [](const Tensor& t) { return t.requires_grad() && t.is_leaf(); };
  if (call.params.size() != expected || !std::all_of(call.params.begin(), call.params.end(), is_trained_leaf))
    return nullptr;
  thread_local KnownNodes known;
  return known.get(call);
}

}  // namespace fused_rnn
