// The gradients of weights that several steps share, as one product over the rows of all these steps.
#pragma once
#include <torch/csrc/autograd/function.h>

#include "torch/layer.h"

namespace fused_rnn {

// torch 2.11 counts the references of a node by std::shared_ptr, torch 2.13 in the node itself.
using NodePointer = decltype(torch::autograd::Edge::function);
using WeakNodePointer =
    std::conditional_t<std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>,
                       std::weak_ptr<torch::autograd::Node>, c10::weak_intrusive_ptr<torch::autograd::Node>>;

template <class T, class... Args>
NodePointer make_node(const Args&... args) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    return NodePointer(new T(args...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(args...);
  }
}

// What the gradients of a step's weights are made of. [rows, I]; [rows, H], undefined: zeros; [rows, S * H].
struct WeightGradientRows {
  Tensor x, h, d_gates;
};

// A node between the steps of a loop (a cell called again and again, a layer called with T = 1) and the weights that these
// calls share. A step's backward hands over its rows, and no gradient, by add(). The engine runs the node after all steps of
// a backward pass: it then has the gradients of all their rows. One step alone would write a matrix as large as the weights,
// and autograd would add it to that of the steps before: three times the memory traffic of the step's own products.
class WeightNode : public torch::autograd::Node {
 public:
  // The node of a call's weights, shared with the calls of this thread whose graphs are alive. Null where a call makes its
  // weight gradients by itself: of several steps, with rows that take no part, of weights that are results of other
  // operations, or where anything but autograd takes part in the call.
  static NodePointer of(const Call& call, bool one_step);

  // Copies the rows. Only for a backward pass that runs this node, under AutoDispatchBelowADInplaceOrView.
  virtual void add(const WeightGradientRows& rows) = 0;
};

}  // namespace fused_rnn
