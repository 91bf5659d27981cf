// The derivative of a layer's backward, in two halves: what it gives to dy and to the gradients of the last states, and what
// it gives to the layer's arguments. A pass that also differentiates the layer itself makes the second half together with
// the layer's own gradients: both are sums over the same recurrence, so that one scan and one set of products serves both.
#pragma once
#include <c10/util/FunctionRef.h>

#include <memory>

#include "torch/weight_node.h"

namespace fused_rnn {

// What a layer's backward was made from, and v, the gradients of its results: of x, states, reset states, params. [0]: none.
struct BackwardRecord {
  Tensor x;
  std::vector<Tensor> states, params;
  Rows rows;
  Recipe recipe;
  ResultGradients given;
  Tensor dh;  // total gradients of h [D, N, H] if the backward kept them (backward_keeping_dh)
  std::vector<Tensor> v;
  // 0, or of samples whose v differ: v of params are [samples, ...], and row b of a step belongs to sample b % samples. For
  // of_results alone.
  int64_t samples = 0;

  Call call() const { return {x, states, params, rows, recipe}; }
};
// From a schema's arguments; saved: of forward, y where backward reads it ([0]: it was written since), dh if it was kept.
BackwardRecord record_of(at::TensorList v, const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                         at::TensorList states, at::TensorList params, at::TensorList rows, at::TensorList saved,
                         int64_t recipe);

// Whether kernels have the derivative of such a call, and serve its device now.
bool has_second_order(const Call& call);
bool second_order_serves(const Tensor& x);

// Whether an entry of BackwardRecord::v is there.
inline bool is_given(const Tensor& v) { return !(v.dim() == 1 && v.size(0) == 0); }

// What a device does for second_order.cpp.
struct SecondOrderScans {
  // Calls f with what products of tensors like x need, such as the device and its precision.
  void (*within)(const Tensor& x, c10::function_ref<void()> f);
  // The scan of tangents of a prepared call, whose params.primal is set.
  void (*tangents)(const Call& call, ForwardCall& made);
  // The scan of dual numbers; call: of the values.
  void (*dual_backward)(const Call& call, DualBackwardParams& params);
  // Whether they may serve tensors like x: on a GPU family step, once it is proven there.
  bool (*serve)(const Tensor& x);
};
const SecondOrderScans& second_order_on_cpu();  // ops_cpu.cpp
#ifdef FUSED_RNN_WITH_CUDA
const SecondOrderScans& second_order_on_device();  // second_order_cuda.cpp
void second_order_is_proven(int device);           // from now on
#endif

// Below autograd.
class SecondOrder {
 public:
  explicit SecondOrder(BackwardRecord record);
  ~SecondOrder();

  // By y, and by each of the last states.
  std::vector<Tensor> of_results();
  // By the arguments; after of_results, once. To these gradients it adds those that dy and of_last have by the layer itself.
  LayerGradients of_arguments(const OptionalTensor& dy, std::vector<OptionalTensor> of_last, GradientMask wanted);

 private:
  class Scans;
  std::unique_ptr<Scans> scans_;
};

// A layer's node, as the node of its backward sees it.
class ForwardNode : public torch::autograd::Node {
 public:
  // Whether the current backward pass is to run this node, and has not done so yet.
  virtual bool runs_later() = 0;
  // For such a node: it makes the gradients of the arguments. Where it has run since, on another thread, it takes nothing,
  // and the result is false.
  virtual bool add(std::unique_ptr<SecondOrder>& second) = 0;
};

// fused_rnn::layer_backward of a call that runs plainly, whose node is a ForwardNode.
LayerGradients layer_backward_of(const NodePointer& forward, const Call& call, const OptionalTensor& dy,
                                 at::TensorList dlast, at::TensorList saved, GradientMask mask);

}  // namespace fused_rnn
