// The scans of second derivatives and tangents on CUDA tensors, for second_order.cpp: the input product of tangents by
// cuBLAS, the recurrences by the kernels of the family step.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "cuda/backend.h"
#include "torch/choice_cuda.h"
#include "torch/device.h"
#include "torch/families_cuda.h"
#include "torch/ops.h"
#include "torch/ops_cuda.h"
#include "torch/second_order.h"
#include "torch/second_order_ops.h"

namespace fused_rnn {
namespace {

void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void within(const Tensor& x, c10::function_ref<void()> f) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  const MatmulPrecision precision(allows_tf32(x));
  f();
}

void run_tangents_cuda(const Call& call, ForwardCall& made) {
  ForwardParams& p = made.params;
  p.allow_tf32 = allows_tf32(call.x);
  allocate_gates(made);
  const Tensor rows = call.x.reshape({p.seq.N, p.I});
  for (int d = 0; d < p.D; ++d) project_rows(call, made, rows, d, 0, p.seq.N);
  run_planned(cuda::problem_of(p), call.x.get_device(), call.recipe, [&](const Plan& plan) {
    const Tensor workspace = workspace_of(plan, call.x);
    p.workspace = workspace.data_ptr();
    cuda::forward(p, plan, current_stream());
  });
}

void run_dual_backward_cuda(const Call& call, DualBackwardParams& params) {
  params.value.allow_tf32 = params.tangent.allow_tf32 = allows_tf32(call.x);
  run_planned(cuda::problem_of(params), call.x.get_device(), call.recipe, [&](const Plan& plan) {
    const Tensor workspace = workspace_of(plan, call.x);
    params.workspace = workspace.data_ptr();
    cuda::dual_backward(params, plan, current_stream());
  });
}

std::array<std::atomic<bool>, 128> proven{};  // by device; the simulated one has number -1

// Where nobody proves families, or the user has named some, step serves what nothing has refused.
bool serve(const Tensor& x) {
  const int device = static_cast<int>(x.get_device());
  const FamilyChoice choice = family_choice(device, Recipe{});
  if (*choice.obstacle(Family::kStep)) return false;
  return choice.forced || choice.cheapest || !has_chooser() || proven.at(std::max(device, 0));
}

}  // namespace

const SecondOrderScans& second_order_on_device() {
  static constexpr SecondOrderScans scans{within, run_tangents_cuda, run_dual_backward_cuda, serve};
  return scans;
}
void second_order_is_proven(int device) { proven.at(std::max(device, 0)) = true; }

}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, FUSED_RNN_DEVICE_KEY, m) {
  m.impl("layer_second_order", fused_rnn::layer_second_order);
  m.impl("layer_jvp", fused_rnn::layer_jvp);
}
