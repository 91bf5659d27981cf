// The kernels of one formula to Python, on the simulated device: included behind the kernels, where
// SIMT_FORMULA_KERNELS(X) lists X(role, segment, tile, name) (tests/simt/formulas.py writes both).
#pragma once
#include <launch.cuh>
#include <stdexcept>
#include <string>

#include "../runtime/capi.h"
#include "cuda/formula/scan.h"

namespace {

using namespace fused_rnn;
using namespace fused_rnn::cuda;

template <class Step>
using Kernel = void (*)(Step);

template <class Step>
void launch_on_simulator(const FormulaLaunch& l, const char* name, Kernel<Step> kernel, const void* arguments,
                         size_t bytes) {
  if (bytes != sizeof(Step)) throw std::invalid_argument("arguments of another size");
  simt::prepare(kernel, name, l.smem_bytes);
  if (l.cluster > 8) simt::allow_large_clusters(kernel, name);
  const simt::LaunchConfig config{
      name, l.grid_x, l.grid_y, l.grid_z, l.threads, l.smem_bytes, l.cluster > 1 ? l.cluster : 1, l.pdl, l.cooperative};
  simt::launch(kernel, config, nullptr, *static_cast<const Step*>(arguments));
}

void launcher(const FormulaLaunch& l, const void* arguments, size_t bytes) {
#define SIMT_FORMULA_KERNEL(of_role, of_segment, of_tile, name)                                                \
  if (static_cast<int>(l.role) == of_role && l.segment == of_segment && static_cast<int>(l.tile) == of_tile) { \
    return launch_on_simulator(l, #name, &name, arguments, bytes);                                             \
  }
  SIMT_FORMULA_KERNELS(SIMT_FORMULA_KERNEL)
#undef SIMT_FORMULA_KERNEL
  throw std::invalid_argument("no such kernel");
}

std::string text;

FormulaStepProblem problem_of(const FormulaLayer& p, const FormulaTraits& cell, int dtype, bool backward) {
  return {&cell, static_cast<DType>(dtype), p.seq.T, p.seq.B, p.H, p.D, p.heads, backward};
}
bool is_step(const std::string& family) { return family == "step" || family == "single"; }
// Backward of `single` is that of `step`.
FormulaStepPlan plan_of(const FormulaLayer& p, const FormulaTraits& cell, int dtype, bool backward, const DeviceInfo& device,
                        const std::string& family) {
  FormulaStepProblem problem = problem_of(p, cell, dtype, backward);
  const bool single = family == "single" && !backward;
  if (single) problem.I = static_cast<const FormulaForward&>(p).I;
  return plan_formula_step(problem, device, single ? Family::kSingle : Family::kStep);
}
FormulaPersistentPlan persistent_plan(const FormulaLayer& p, const FormulaTraits& cell, int dtype, bool backward,
                                      const DeviceInfo& device, const std::string& family, int ranks) {
  return plan_formula_persistent(problem_of(p, cell, dtype, backward), device,
                                 family == "grid" ? Family::kGrid : Family::kCluster, ranks);
}

}  // namespace

extern "C" void simt_formula_sizes(int* sizes) {
  sizes[0] = sizeof(FormulaForward), sizes[1] = sizeof(FormulaBackward), sizes[2] = sizeof(FormulaTraits);
}
// Bytes of working memory, zeros of a persistent family; the plan is then simt_formula_text(). family, here and below:
// "step", "single", "cluster" or "grid"; ranks: of the latter two the blocks of a team, 0: as many as the planner takes.
extern "C" int64_t simt_formula_workspace(const FormulaLayer* p, const FormulaTraits* cell, int dtype, bool backward,
                                          const DeviceInfo* device, const char* family, int ranks) {
  if (!is_step(family)) {
    try {
      const FormulaPersistentPlan plan = persistent_plan(*p, *cell, dtype, backward, *device, family, ranks);
      text = to_string(plan);
      return plan.exchange_bytes;
    } catch (const std::invalid_argument& error) {
      text = error.what();
      return 0;
    }
  }
  const FormulaStepPlan plan = plan_of(*p, *cell, dtype, backward, *device, family);
  text = to_string(plan);
  return plan.workspace.bytes;
}
extern "C" const char* simt_formula_text() { return text.c_str(); }
extern "C" int simt_formula_forward(const FormulaForward* p, const FormulaTraits* cell, int dtype, const DeviceInfo* device,
                                    void* workspace, const char* family, int ranks) {
  return simt_host::run_guarded([&] {
    if (is_step(family))
      return run_formula_forward(*p, *cell, plan_of(*p, *cell, dtype, false, *device, family), workspace, launcher);
    run_formula_persistent_forward(*p, *cell, persistent_plan(*p, *cell, dtype, false, *device, family, ranks), workspace,
                                   launcher);
  });
}
extern "C" int simt_formula_backward(const FormulaBackward* p, const FormulaTraits* cell, int dtype,
                                     const DeviceInfo* device, void* workspace, const char* family, int ranks) {
  return simt_host::run_guarded([&] {
    if (is_step(family))
      return run_formula_backward(*p, *cell, plan_of(*p, *cell, dtype, true, *device, family), workspace, launcher);
    run_formula_persistent_backward(*p, *cell, persistent_plan(*p, *cell, dtype, true, *device, family, ranks), workspace,
                                    launcher);
  });
}
// One launch, which is over when the call returns.
extern "C" int simt_formula_launch(const FormulaLaunch* l, const void* arguments, size_t bytes) {
  return simt_host::run_guarded([&] { launcher(*l, arguments, bytes); });
}
