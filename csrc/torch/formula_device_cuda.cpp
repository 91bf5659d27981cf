#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "core/recent.h"
#include "cuda/backend.h"
#include "cuda/formula/driver.h"
#include "plan/formula_choice.h"
#include "torch/families_cuda.h"
#include "torch/formula_device.h"
#include "torch/settings.h"

namespace fused_rnn {
namespace {

using LibraryKey = std::tuple<std::string, int, int>;  // formula, dtype, capability

// Modules stay in memory for good, those that were forgotten too, since calls may be running.
std::mutex modules_mutex;
std::map<LibraryKey, cuda::FormulaModule*>& modules() {
  static auto* const all = new std::map<LibraryKey, cuda::FormulaModule*>;
  return *all;
}

// The device as the planner sees it: formulas are compiled for its very architecture.
DeviceInfo info_of(int device) {
  DeviceInfo info = cuda::device_info(device);
  info.compiled_for = info.compute_capability;
  return info;
}

cuda::FormulaModule* find(const std::string& formula, DType dtype, int device) {
  const std::lock_guard<std::mutex> lock(modules_mutex);
  if (device < 0) {
    const auto first = modules().lower_bound({formula, static_cast<int>(dtype), 0});
    const bool same = first != modules().end() && std::get<0>(first->first) == formula &&
                      std::get<1>(first->first) == static_cast<int>(dtype);
    return same ? first->second : nullptr;
  }
  const auto found = modules().find({formula, static_cast<int>(dtype), cuda::device_info(device).compute_capability});
  return found == modules().end() ? nullptr : found->second;
}

// What both scans have.
void fill(cuda::FormulaLayer& to, const cpu::FormulaParams& from) {
  to.H = from.H, to.D = from.D, to.heads = from.heads;
  to.seq = from.seq;
  to.modifier = from.modifier;
  for (int i = 0; i < kMostFormulaStates; ++i) to.initial[i] = from.states[i], to.reset_states[i] = from.reset_states[i];
  for (int d = 0; d < from.D; ++d) {
    cuda::FormulaDirection& weights = to.weights[d];
    weights.w_ih = from.weights[d].w_ih.data, weights.b_ih = from.weights[d].b_ih;
    weights.w_hh = from.weights[d].w_hh.data;
    weights.b_hh = from.weights[d].b_hh;
    weights.parameters = from.weights[d].parameters;
    for (int k = 0; k < kMostFormulaPhases; ++k) {
      const cpu::FormulaPhaseWeights& phase = from.weights[d].phases[k];
      weights.weight[k] = phase.matrix.data ? phase.matrix.data : phase.weight;
      weights.bias[k] = phase.bias;
    }
  }
}

FormulaStepProblem problem_of(const FormulaTraits& traits, const cpu::FormulaParams& p, bool backward) {
  FormulaStepProblem problem{&traits, p.dtype, p.seq.T, p.seq.B, p.H, p.D, p.heads, backward};
  for (const ResetState& put : p.reset_states) problem.reset_states |= put.data != nullptr;
  return problem;
}
FormulaStepProblem problem_of(const FormulaTraits& traits, const cpu::FormulaForward& p) {
  FormulaStepProblem problem = problem_of(traits, p, /*backward=*/false);
  problem.I = p.x && !p.given ? p.I : 0;
  return problem;
}
FormulaStepProblem problem_of(const FormulaTraits& traits, const cpu::FormulaBackward& p) {
  FormulaStepProblem problem = problem_of(traits, p, /*backward=*/true);
  for (const void* d : p.d_series) problem.d_series |= d != nullptr;
  return problem;
}

// What FUSED_RNN_PLAN says, among the kernels that have been verified.
const FormulaPlan& plan_of(const cuda::FormulaModule& module, const FormulaStepProblem& problem, int device) {
  using Key = std::tuple<const void*, int, DType, FamilyChoice, int, std::array<int64_t, 9>>;
  // A layer's forward and backward ask in turn.
  static thread_local Recent<Key, FormulaPlan, 16> recent;
  int ranks = 0;
  FamilyChoice setting = family_setting();
  if (captures_without_cooperative_launches()) setting.refused |= 1u << static_cast<int>(Family::kGrid);
  const FamilyChoice choice = module.choice(setting, device, ranks);
  const FormulaStepProblem& p = problem;
  const std::array<int64_t, 9> sizes{p.T, p.B, p.H, p.D, p.heads, p.backward, p.reset_states, p.d_series, p.I};
  return recent.get({&module, device, p.dtype, choice, ranks, sizes},
                    [&] { return plan_formula(problem, info_of(device), choice, ranks); });
}

// run(plan, workspace, launch) with the kernels of a call; where the device refuses the launch, with those of the next
// family.
template <class Params, class Run>
void run_formula_planned(const std::string& formula, const Params& p, const at::Tensor& x, const Run& run) {
  const int device = static_cast<int>(x.get_device());
  cuda::FormulaModule* const module = find(formula, p.dtype, device);
  TORCH_CHECK(module, "cell: the formula ", formula, " has no kernels in this process for ", x.scalar_type(), " on ",
              x.device(), ": make a fused_rnn.Layer of the cell first");
  const FormulaStepProblem problem = problem_of(module->traits(), p);
  const cuda::FormulaLauncher launch = module->launcher(device, c10::cuda::getCurrentCUDAStream().stream());
  for (;;) {
    const FormulaPlan& plan = plan_of(*module, problem, device);
    const auto bytes = x.options().dtype(at::kByte);
    const at::Tensor workspace =
        plan.persistent ? at::zeros({plan.workspace_bytes}, bytes) : at::empty({plan.workspace_bytes}, bytes);
    try {
      return run(module->traits(), plan, workspace.data_ptr(), launch);
    } catch (const LaunchRefused& caught) {
      if (!plan.persistent || family_setting().forced == plan.family) throw;
      if (!module->refuse(plan.family, device)) continue;  // another thread has warned
      TORCH_WARN("fused_rnn: kernel family ", to_string(plan.family), " of ", formula, " does not serve on ", x.device(),
                 " any more, which refused its launch (", caught.what(), "); the next family does");
    }
  }
}

}  // namespace

void register_formula_on_device(const std::string& formula, const std::string& path) {
  auto* const module = new cuda::FormulaModule(path);
  const std::lock_guard<std::mutex> lock(modules_mutex);
  modules()[{formula, static_cast<int>(module->dtype()), module->capability()}] = module;
}

void add_formula_on_device(const std::string& formula, const std::string& path) {
  auto* const module = new cuda::FormulaModule(path);
  const std::lock_guard<std::mutex> lock(modules_mutex);
  const auto found = modules().find({formula, static_cast<int>(module->dtype()), module->capability()});
  TORCH_CHECK_VALUE(found != modules().end(), "formula: expected one with kernels in this process, got ", formula);
  found->second->add(module);
}

void forget_formula_on_device(const std::string& formula, int dtype, int capability) {
  const std::lock_guard<std::mutex> lock(modules_mutex);
  modules().erase({formula, dtype, capability});
}

bool has_formula_on_device(const std::string& formula, int dtype, int capability) {
  const std::lock_guard<std::mutex> lock(modules_mutex);
  return modules().count({formula, dtype, capability}) > 0;
}

void set_formula_family(const std::string& formula, int dtype, int capability, const std::string& family, int state,
                        int ranks) {
  const std::lock_guard<std::mutex> lock(modules_mutex);
  const auto found = modules().find({formula, dtype, capability});
  TORCH_CHECK_VALUE(found != modules().end(), "formula: expected one with kernels in this process, got ", formula);
  TORCH_CHECK_VALUE(state >= 0 && state <= 2, "state: expected 0, 1 or 2, got ", state);
  for (Family one : {Family::kSingle, Family::kCluster, Family::kGrid}) {
    if (family != to_string(one)) continue;
    return found->second->set_family(one, static_cast<cuda::FormulaModule::Serves>(state), ranks);
  }
  TORCH_CHECK_VALUE(false, "family: expected single, cluster or grid, got ", family);
}

const FormulaTraits* formula_traits_on_device(const std::string& formula, DType dtype, int device) {
  const cuda::FormulaModule* const module = find(formula, dtype, device);
  return module ? &module->traits() : nullptr;
}

void formula_forward_on_device(const std::string& formula, const cpu::FormulaForward& p, const at::Tensor& x,
                               const std::function<at::Tensor()>& input_products) {
  cuda::FormulaForward to{};
  fill(to, p);
  to.input = p.x, to.I = p.I;
  to.y = p.y;
  to.saved = p.saved;
  for (int i = 0; i < kMostFormulaStates; ++i) to.last[i] = p.last[i], to.series[i] = p.series[i];
  for (int k = 0; k < kMostFormulaPhases; ++k) to.v[k] = p.v[k];
  at::Tensor products;
  run_formula_planned(
      formula, p, x,
      [&](const FormulaTraits& traits, const FormulaPlan& plan, void* workspace, const cuda::FormulaLauncher& launch) {
        if (plan.family != Family::kSingle) {
          if (!products.defined()) products = input_products();
        } else if (traits.phases > 0) {
          products = at::empty({p.D, p.seq.N, traits.input_gates, p.H}, x.options().requires_grad(false));
        }
        to.x = products.defined() ? products.data_ptr() : nullptr;
        if (plan.persistent) return run_formula_persistent_forward(to, traits, *plan.persistent, workspace, launch);
        run_formula_forward(to, traits, *plan.step, workspace, launch);
      });
}

void formula_backward_on_device(const std::string& formula, const cpu::FormulaBackward& p, const at::Tensor& x) {
  cuda::FormulaBackward to{};
  fill(to, p);
  to.y = p.y;
  to.saved = p.saved;
  to.dy = p.dy;
  to.d = p.d;
  for (int i = 0; i < kMostFormulaStates; ++i) {
    to.series[i] = p.series[i], to.d_last[i] = p.d_last[i], to.d_series[i] = p.d_series[i];
    to.d_initial[i] = p.d_states[i], to.d_reset[i] = p.d_reset[i];
  }
  for (int k = 0; k < kMostFormulaPhases; ++k) to.v[k] = p.v[k];
  run_formula_planned(
      formula, p, x,
      [&](const FormulaTraits& traits, const FormulaPlan& plan, void* workspace, const cuda::FormulaLauncher& launch) {
        if (plan.persistent) return run_formula_persistent_backward(to, traits, *plan.persistent, workspace, launch);
        run_formula_backward(to, traits, *plan.step, workspace, launch);
      });
}

std::string formula_plan_on_device(const std::string& formula, int dtype, int device, int64_t T, int64_t B, int64_t H, int D,
                                   int heads, bool backward) {
  const cuda::FormulaModule* const module = find(formula, static_cast<DType>(dtype), device);
  TORCH_CHECK_VALUE(module, "formula: expected one with kernels for device ", device, " in this process, got ", formula);
  FormulaStepProblem problem{&module->traits(), static_cast<DType>(dtype), T, B, H, D, heads, backward};
  problem.I = backward ? 0 : H;
  return to_string(plan_of(*module, problem, device));
}

}  // namespace fused_rnn
