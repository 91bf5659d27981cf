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
  const simt::LaunchConfig config{name, l.grid_x, l.grid_y, l.grid_z, l.threads, l.smem_bytes, l.cluster, l.pdl, false};
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
FormulaStepPlan plan_of(const FormulaLayer& p, const FormulaTraits& cell, int dtype, bool backward,
                        const DeviceInfo& device) {
  return plan_formula_step(problem_of(p, cell, dtype, backward), device);
}

}  // namespace

extern "C" void simt_formula_sizes(int* sizes) {
  sizes[0] = sizeof(FormulaForward), sizes[1] = sizeof(FormulaBackward), sizes[2] = sizeof(FormulaTraits);
}
// Bytes of working memory; the plan is then simt_formula_text(). ranks, here and below: -1: family step, else the blocks of
// a cluster, 0: as many as the planner takes.
extern "C" int64_t simt_formula_workspace(const FormulaLayer* p, const FormulaTraits* cell, int dtype, bool backward,
                                          const DeviceInfo* device, int ranks) {
  if (ranks >= 0) {
    try {
      text = to_string(plan_formula_cluster(problem_of(*p, *cell, dtype, backward), *device, ranks));
    } catch (const std::invalid_argument& error) {
      text = error.what();
    }
    return 0;
  }
  const FormulaStepPlan plan = plan_of(*p, *cell, dtype, backward, *device);
  text = to_string(plan);
  return plan.workspace.bytes;
}
extern "C" const char* simt_formula_text() { return text.c_str(); }
extern "C" int simt_formula_forward(const FormulaForward* p, const FormulaTraits* cell, int dtype, const DeviceInfo* device,
                                    void* workspace, int ranks) {
  return simt_host::run_guarded([&] {
    if (ranks < 0) return run_formula_forward(*p, *cell, plan_of(*p, *cell, dtype, false, *device), workspace, launcher);
    const FormulaStepProblem problem = problem_of(*p, *cell, dtype, false);
    run_formula_cluster_forward(*p, *cell, plan_formula_cluster(problem, *device, ranks), launcher);
  });
}
extern "C" int simt_formula_backward(const FormulaBackward* p, const FormulaTraits* cell, int dtype,
                                     const DeviceInfo* device, void* workspace, int ranks) {
  return simt_host::run_guarded([&] {
    if (ranks < 0) return run_formula_backward(*p, *cell, plan_of(*p, *cell, dtype, true, *device), workspace, launcher);
    const FormulaStepProblem problem = problem_of(*p, *cell, dtype, true);
    run_formula_cluster_backward(*p, *cell, plan_formula_cluster(problem, *device, ranks), launcher);
  });
}
// One launch, which is over when the call returns.
extern "C" int simt_formula_launch(const FormulaLaunch* l, const void* arguments, size_t bytes) {
  return simt_host::run_guarded([&] { launcher(*l, arguments, bytes); });
}
