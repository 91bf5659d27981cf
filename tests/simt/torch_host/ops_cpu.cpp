// In place of csrc/torch/ops_cpu.cpp: CPU tensors are those of the device here, and no call goes around the dispatcher.
#include "torch/ops.h"
#include "torch/second_order.h"

namespace fused_rnn {

bool runs_plainly_on_cpu(const Call&) { return false; }
Results run_on_cpu(const Call&) { throw std::logic_error("no CPU kernels here"); }
LayerGradients step_backward_on_cpu(const Call&, const ResultGradients&, GradientMask, WeightNode&) {
  throw std::logic_error("no CPU kernels here");
}

const SecondOrderScans& second_order_on_cpu() { throw std::logic_error("no CPU kernels here"); }
std::pair<LayerGradients, Tensor> backward_keeping_dh(const Call&, const ResultGradients&, GradientMask) {
  throw std::logic_error("no CPU kernels here");
}

}  // namespace fused_rnn
