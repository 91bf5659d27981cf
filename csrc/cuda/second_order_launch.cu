// Host side of the scans of tangents and of dual numbers: one or two launches per time step, as step_launch.cu.
#include <optional>
#include <stdexcept>

#include "cuda/copy_width.h"
#include "cuda/family.h"
#include "cuda/step/kernels.h"
#include "cuda/step/step_kernel.h"
#include "plan/step.h"

namespace fused_rnn::cuda {
namespace {

// f(std::integral_constant) with an arithmetic that has these kernels.
template <class F>
auto dispatch_second_order(MathKind kind, F&& f) {
  switch (kind) {
    case MathKind::kFp64: return f(std::integral_constant<MathKind, MathKind::kFp64>{});
    case MathKind::kFp32: return f(std::integral_constant<MathKind, MathKind::kFp32>{});
    case MathKind::kTf32: return f(std::integral_constant<MathKind, MathKind::kTf32>{});
    case MathKind::kFp16:
    case MathKind::kBf16: break;
  }
  throw std::invalid_argument("second derivatives are of float32 and float64 alone");
}

StepKernel<TangentStep> tangent_kernel_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  const auto of_math = [&](auto math) {
    return SecondOrderKernels<decltype(math)::value>::tangents(role, cell, kernel.tile);
  };
  return {dispatch_second_order(kernel.math, of_math), kernel, plan.pdl};
}
StepKernel<DualStep> dual_kernel_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  const auto of_math = [&](auto math) {
    return SecondOrderKernels<decltype(math)::value>::dual_backward(role, cell, kernel.tile);
  };
  return {dispatch_second_order(kernel.math, of_math), kernel, plan.pdl};
}

}  // namespace

void step_tangents(const ForwardParams& p, const Plan& plan, void* stream) {
  const bool projected = p.P != p.H;
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  TangentStep step{{p, 0, 0, 0, 0, nullptr, nullptr}, *p.primal};
  if (projected) step.hidden = static_cast<unsigned char*>(p.workspace) + workspace_layout(problem_of(p)).hidden;
  const Weights &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  const ResetState& put = p.modifier.h;
  step.copy_state = copy_width({w0.w_hh.data, w1.w_hh.data, p.y, p.h0, put.data},
                               (p.P * bytes) | put.step | put.direction | put.row, bytes);
  TangentStep project_step = step;
  project_step.copy_state = copy_width({w0.w_hr.data, w1.w_hr.data, step.hidden}, p.H * bytes, bytes);

  auto launch = tangent_kernel_of(plan, KernelRole::kTangents, p.cell);
  std::optional<StepKernel<TangentStep>> project;
  if (projected) project = tangent_kernel_of(plan, KernelRole::kProjectTangents, p.cell);
  for (int64_t s = 0; s < p.seq.T; ++s) {
    step.step = project_step.step = s;
    launch(step, s == 0, stream);
    if (project) (*project)(project_step, false, stream);
  }
}

void step_dual_backward(const DualBackwardParams& p, const Plan& plan, void* stream) {
  const BackwardParams &value = p.value, &tangent = p.tangent;
  const bool projected = value.P != value.H;
  if (projected && !(value.d_h && tangent.d_h)) throw std::invalid_argument("backward of a projected LSTM needs d_h");
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  const WorkspaceLayout layout = workspace_layout(problem_of(p));
  DualStep step{{value, tangent}, 0, 0, 0, {nullptr, nullptr}};
  if (layout.carry_bytes) {
    auto* carry = static_cast<unsigned char*>(p.workspace) + layout.carry;
    step.carry[0] = carry, step.carry[1] = carry + layout.carry_bytes / 2;
  }
  // A product with W_hh copies rows of W_hh and of d_gates; one with W_hr rows of W_hr and of d_h.
  const Weights &v0 = value.weights[0], &v1 = value.weights[value.D - 1];
  const Weights &t0 = tangent.weights[0], &t1 = tangent.weights[value.D - 1];
  const int64_t row_bytes = (value.P | value.H) * bytes;
  DualStep state_step = step;
  state_step.copy_bytes =
      copy_width({v0.w_hh.data, v1.w_hh.data, t0.w_hh.data, t1.w_hh.data, value.d_gates, tangent.d_gates}, row_bytes, bytes);
  step.copy_bytes = state_step.copy_bytes;
  if (projected) {
    step.copy_bytes =
        copy_width({v0.w_hr.data, v1.w_hr.data, t0.w_hr.data, t1.w_hr.data, value.d_h, tangent.d_h}, row_bytes, bytes);
  }

  auto launch = dual_kernel_of(plan, KernelRole::kDualBackward, value.cell);
  auto state_grad = dual_kernel_of(plan, KernelRole::kDualStateGrad, value.cell);
  bool first = true;
  for (int64_t s = value.seq.T - 1; s >= 0; --s) {
    step.step = state_step.step = s;
    if (projected) {
      state_grad(state_step, first, stream);
      first = false;
    }
    launch(step, first, stream);
    first = false;
  }
  if (!tangent.d_h0) return;
  state_step.step = -1;
  state_grad(state_step, first, stream);
}

}  // namespace fused_rnn::cuda
