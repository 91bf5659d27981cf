// Host side of the families `single` and `step`: one or two launches per time step, back to back on the caller's stream.
#include <launch.cuh>
#include <optional>

#include "cuda/copy_width.h"
#include "cuda/family.h"
#include "cuda/step/arguments.h"
#include "cuda/step/kernels.h"
#include "cuda/step/step_kernel.h"
#include "plan/step.h"

namespace fused_rnn::cuda {
namespace {

StepKernel<ForwardStep> forward_kernel_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  const auto of_math = [&](auto math) { return Kernels<decltype(math)::value>::forward(role, cell, kernel.tile); };
  return {dispatch_math(kernel.math, of_math), kernel, plan.pdl};
}
StepKernel<BackwardStep> backward_kernel_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  const auto of_math = [&](auto math) { return Kernels<decltype(math)::value>::backward(role, cell, kernel.tile); };
  return {dispatch_math(kernel.math, of_math), kernel, plan.pdl};
}

}  // namespace

void step_forward(const ForwardParams& p, const Plan& plan, const StepRange&, void* stream) {
  if (p.primal) return step_tangents(p, plan, stream);
  const bool projected = p.weights[0].w_hr.data != nullptr, input = traits_of(plan.family).reads_x;
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  ForwardStep step = arguments_of(p, workspace_layout(problem_of(p)));
  const Weights &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  const ResetState& put = p.modifier.h;
  step.copy_state = copy_width({w0.w_hh.data, w1.w_hh.data, p.y, p.h0, put.data, p.modifier.product},
                               (p.P * bytes) | put.step | put.direction | put.row, bytes);
  if (input) step.copy_input = copy_width({w0.w_ih.data, w1.w_ih.data, p.x}, p.I * bytes, bytes);
  ForwardStep project_step = step;
  project_step.copy_state = copy_width({w0.w_hr.data, w1.w_hr.data, step.hidden}, p.H * bytes, bytes);

  auto launch = forward_kernel_of(plan, forward_role(input, problem_of(p).modified), p.cell);
  std::optional<StepKernel<ForwardStep>> project;
  if (projected) project = forward_kernel_of(plan, KernelRole::kProject, p.cell);
  for (int64_t s = 0; s < p.seq.T; ++s) {
    step.step = project_step.step = s;
    launch(step, s == 0, stream);
    if (project) (*project)(project_step, false, stream);
  }
}

void step_backward(const BackwardParams& p, const Plan& plan, const StepRange&, void* stream) {
  const bool projected = p.weights[0].w_hr.data != nullptr;
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  BackwardStep step = arguments_of(p, workspace_layout(problem_of(p)));
  // A product with W_hh copies rows of W_hh and of d_gates; one with W_hr rows of W_hr and of d_h.
  const Weights &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  const int recurrent_width = copy_width({w0.w_hh.data, w1.w_hh.data, p.d_gates}, (p.P | p.H) * bytes, bytes);
  BackwardStep state_step = step;
  state_step.copy_bytes = recurrent_width;
  step.copy_bytes =
      projected ? copy_width({w0.w_hr.data, w1.w_hr.data, p.d_h}, (p.P | p.H) * bytes, bytes) : recurrent_width;

  auto launch = backward_kernel_of(plan, backward_role(problem_of(p).modified), p.cell);
  auto state_grad = backward_kernel_of(plan, KernelRole::kStateGrad, p.cell);
  bool first = true;
  for (int64_t s = p.seq.T - 1; s >= 0; --s) {
    step.step = state_step.step = s;
    if (projected) {
      state_grad(state_step, first, stream);
      first = false;
    }
    launch(step, first, stream);
    first = false;
  }
  if (!p.d_h0) return;
  state_step.step = -1;
  state_grad(state_step, first, stream);
}

}  // namespace fused_rnn::cuda
