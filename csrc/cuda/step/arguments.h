// What the launchers of families with launches for every step share: arguments, and kernels of a plan.
#pragma once
#include <launch.cuh>
#include <stdexcept>
#include <string>

#include "cuda/step/kernels.h"
#include "plan/step.h"

namespace fused_rnn::cuda {

inline const KernelPlan& kernel_of(const Plan& plan, KernelRole role) {
  for (const KernelPlan& kernel : plan.kernels) {
    if (kernel.role == role) return kernel;
  }
  throw std::invalid_argument(std::string("the plan has no kernel ") + to_string(role));
}

inline simt::LaunchConfig config_of(const KernelPlan& plan) {
  return {to_string(plan.role),
          static_cast<int>(plan.grid_x),
          static_cast<int>(plan.grid_y),
          static_cast<int>(plan.grid_z),
          plan.threads,
          plan.smem_bytes,
          1,
          false,
          false};
}

// The arguments of every step, with their places in the workspace.
inline ForwardStep arguments_of(const ForwardParams& p, const WorkspaceLayout& layout) {
  auto* workspace = static_cast<unsigned char*>(p.workspace);
  ForwardStep step{p, 0, 0, 0, 0, nullptr, nullptr};
  if (layout.carry_bytes) step.c = workspace + layout.carry;
  if (p.weights[0].w_hr.data) step.hidden = workspace + layout.hidden;
  return step;
}
inline BackwardStep arguments_of(const BackwardParams& p, const WorkspaceLayout& layout) {
  const bool projected = p.weights[0].w_hr.data != nullptr;
  if (projected && !p.d_h) throw std::invalid_argument("backward of a projected LSTM needs d_h");
  BackwardStep step{p, 0, 0, 0, nullptr, nullptr};
  if (!projected) step.p.d_h = nullptr;
  auto* workspace = static_cast<unsigned char*>(p.workspace);
  if (layout.carry_bytes) step.carry = workspace + layout.carry;
  if (traits_of(p.cell).reads_h) {
    step.carry_h = step.carry;
  } else if (layout.carry_h_bytes && is_zoneout(p.modifier.zoneout_h)) {
    step.carry_h = workspace + layout.carry_h;
  }
  return step;
}

}  // namespace fused_rnn::cuda
