// The CUDA backend's own host code on the simulated device.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "capi.h"
#include "cuda/backend.h"
#include "cuda/library_product.h"
#include "device.h"
#include "plan/overlap.h"

using namespace fused_rnn;

namespace {
std::string text;
}

// A plan on the heap; null with simt_plan_text() saying why there is none. forced: -1 or a Family.
extern "C" Plan* simt_make_plan(const Problem* problem, const DeviceInfo* device, int forced) {
  try {
    FamilyChoice choice;
    if (forced >= 0) choice.forced = static_cast<Family>(forced);
    auto* plan = new Plan(make_plan(*problem, *device, choice));
    text = to_string(*plan);
    return plan;
  } catch (const std::exception& e) {
    text = e.what();
    return nullptr;
  }
}
// Gives every kernel of the plan another tile and number of stages; returns whether all have that tile.
extern "C" bool simt_force_tile(Plan* plan, const Problem* problem, int tile_size, int stages) {
  const auto size = static_cast<cuda::TileSize>(tile_size);
  for (KernelPlan& k : plan->kernels) {
    if (!cuda::has_tile(k.math, size)) return false;
    const cuda::TileShape tile = cuda::tile_shape(k.role, k.math, size);
    const bool outputs = k.role == cuda::KernelRole::kProject || k.role == cuda::KernelRole::kStateGrad ||
                         k.role == cuda::KernelRole::kProjectTangents || k.role == cuda::KernelRole::kDualStateGrad;
    k.tile = size;
    k.grid_x = (cuda::tile_rows(k.role, problem->B) + tile.batch - 1) / tile.batch;
    k.grid_y = ((outputs ? problem->P : problem->H) + tile.units - 1) / tile.units;
    k.threads = cuda::tile_threads(tile);
    k.stages = stages;
    k.smem_bytes = cuda::smem_bytes(k.role, problem->cell, k.math, tile, stages);
  }
  text = to_string(*plan);
  return true;
}
extern "C" const char* simt_plan_text() { return text.c_str(); }
extern "C" int64_t simt_plan_workspace(const Plan* plan) { return plan->workspace_bytes; }
extern "C" bool simt_plan_reads_x(const Plan* plan) { return traits_of(plan->family).reads_x; }
extern "C" void simt_sizes(int* sizes) {
  sizes[0] = sizeof(ForwardParams);
  sizes[1] = sizeof(BackwardParams);
  sizes[2] = sizeof(Problem);
  sizes[3] = sizeof(DeviceInfo);
  sizes[4] = sizeof(DualBackwardParams);
}
// What the backend finds out about the device; kept for each number. Returns whether there is such a device.
extern "C" bool simt_device_info(int number, DeviceInfo* info) {
  try {
    *info = cuda::device_info(number);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}
// The family of the plan that the backend keeps for the device of that number, and whether it is the one of the last call.
extern "C" int simt_plan_for(const Problem* problem, int number, const char* choice, bool* same) {
  static const Plan* last = nullptr;
  const Plan& plan = cuda::plan_for(*problem, number, *choice ? parse_choice(choice) : FamilyChoice{});
  *same = &plan == last;
  last = &plan;
  return static_cast<int>(plan.family);
}
// Who makes the products of family `gemm`, in place of benchmarks/torch_free/plain_product.cu.
extern "C" void simt_set_library_product(cuda::LibraryProductFunction function) { cuda::set_library_product(function); }
extern "C" void simt_free_plan(Plan* plan) { delete plan; }
extern "C" void simt_problem_forward(const ForwardParams* params, Problem* problem) { *problem = cuda::problem_of(*params); }
extern "C" void simt_problem_backward(const BackwardParams* params, Problem* problem) {
  *problem = cuda::problem_of(*params);
}
extern "C" void simt_problem_dual_backward(const DualBackwardParams* params, Problem* problem) {
  *problem = cuda::problem_of(*params);
}
extern "C" int simt_forward(const ForwardParams* params, const Plan* plan) {
  return simt_host::run_guarded([&] { cuda::forward(*params, *plan, nullptr); });
}
extern "C" int simt_backward(const BackwardParams* params, const Plan* plan) {
  return simt_host::run_guarded([&] { cuda::backward(*params, *plan, nullptr); });
}
extern "C" int simt_dual_backward(const DualBackwardParams* params, const Plan* plan) {
  return simt_host::run_guarded([&] { cuda::dual_backward(*params, *plan, nullptr); });
}
// The same of forward and backward by a call for each range of steps [bounds[i], bounds[i + 1]).
extern "C" int simt_forward_steps(const ForwardParams* params, const Plan* plan, const int64_t* bounds, int ranges,
                                  float* carry) {
  return simt_host::run_guarded([&] {
    for (int i = 0; i < ranges; ++i) cuda::forward_steps(*params, *plan, {bounds[i], bounds[i + 1], carry}, nullptr);
  });
}
extern "C" int simt_write_integers(int64_t* to, const int64_t* integers, int64_t count) {
  return simt_host::run_guarded([&] { cuda::write_integers(to, integers, count, nullptr); });
}
extern "C" int simt_write_flags(bool* to, const bool* flags, int64_t count) {
  return simt_host::run_guarded([&] { cuda::write_flags(to, flags, count, nullptr); });
}
extern "C" int simt_previous_rows(const PreviousParams* params) {
  return simt_host::run_guarded([&] { cuda::previous_rows(*params, nullptr); });
}
// The tasks of an overlap; returns how many there are.
extern "C" int simt_overlap_tasks(int layers, int directions, bool backward, int64_t T, int64_t chunk_steps,
                                  int concurrent_layers, OverlapTask* tasks, int room) {
  const auto all = overlap_tasks(layers, directions, backward, T, chunk_steps, concurrent_layers);
  std::copy_n(all.begin(), std::min<size_t>(room, all.size()), tasks);
  return static_cast<int>(all.size());
}
extern "C" int simt_backward_steps(const BackwardParams* params, const Plan* plan, const int64_t* bounds, int ranges,
                                   float* carry) {
  return simt_host::run_guarded([&] {
    for (int i = 0; i < ranges; ++i) cuda::backward_steps(*params, *plan, {bounds[i], bounds[i + 1], carry}, nullptr);
  });
}
