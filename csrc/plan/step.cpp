// The planner of the step kernels: tiles are chosen by the cost model of machine.h.
#include "plan/step.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "core/ceil_div.h"
#include "plan/stages.h"
#include "plan/step_cost.h"

namespace fused_rnn {

using cuda::KernelRole;
using cuda::MathKind;
using cuda::TileShape;
using cuda::TileSize;

namespace {

constexpr TileSize kAllTiles[] = {TileSize::kSmall, TileSize::kMedium, TileSize::kLarge};

// Size of the product that a kernel makes for every batch row and direction: units x (k[0] + k[1]).
struct Product {
  int64_t units;
  int64_t k[2];
};

Product product_of(const Problem& problem, KernelRole role) {
  const bool projected = problem.P != problem.H;
  const int64_t gates = gate_count(problem.cell);
  switch (role) {
    case KernelRole::kForward:
    case KernelRole::kForwardModified:
    case KernelRole::kTangents: return {problem.H, {problem.P, 0}};
    case KernelRole::kForwardInput: return {problem.H, {problem.P, problem.I}};
    case KernelRole::kProject:
    case KernelRole::kProjectTangents: return {problem.P, {problem.H, 0}};
    case KernelRole::kBackward:
    case KernelRole::kBackwardModified: return {problem.H, {projected ? problem.P : gates * problem.H, 0}};
    case KernelRole::kStateGrad: return {problem.P, {gates * problem.H, 0}};
    // With the tangents of the weights, and with the weights.
    case KernelRole::kDualBackward: {
      const int64_t k = projected ? problem.P : gates * problem.H;
      return {problem.H, {k, k}};
    }
    case KernelRole::kDualStateGrad: return {problem.P, {gates * problem.H, gates * problem.H}};
  }
  return {};
}

double kernel_us(const Problem& problem, const DeviceInfo& device, MathKind math, KernelRole role, const TileShape& tile,
                 const KernelPlan& plan, const Product& product, int64_t chunks) {
  const int64_t blocks = plan.grid_x * plan.grid_y * plan.grid_z;
  const int groups = cuda::weight_groups(role, problem.cell);
  const int64_t k = product.k[0] + product.k[1];
  const double weight_bytes = double(problem.D) * groups * double(product.units * k) * cuda::storage_bytes(math);
  return step_launch_us(device) + product_us({math, tile, groups, k, chunks, blocks, plan.stages, weight_bytes}, device);
}

// The cheapest tile of a kernel; throws if none fits the device.
KernelPlan plan_kernel(const Problem& problem, const DeviceInfo& device, MathKind math, KernelRole role,
                       std::string& notes) {
  const Product product = product_of(problem, role);
  const int64_t chunk = cuda::chunk_size(math), chunks = ceil_div(product.k[0], chunk) + ceil_div(product.k[1], chunk);
  KernelPlan best{};
  std::string tried;
  for (TileSize size : kAllTiles) {
    char text[96];
    if (!cuda::has_tile(math, size)) continue;
    const TileShape tile = cuda::tile_shape(role, math, size);
    KernelPlan plan{};
    plan.role = role;
    plan.tile = size;
    plan.math = math;
    plan.stages = choose_stages(device, tile, chunks,
                                [&](int stages) { return cuda::smem_bytes(role, problem.cell, math, tile, stages); });
    if (plan.stages == 0) {
      std::snprintf(text, sizeof text, "%s%dx%d needs %d bytes of shared memory", tried.empty() ? "" : ", ", tile.units,
                    tile.batch, cuda::smem_bytes(role, problem.cell, math, tile, cuda::kMinStages));
      tried += text;
      continue;
    }
    plan.grid_x = ceil_div(cuda::tile_rows(role, problem.B), tile.batch);
    plan.grid_y = ceil_div(product.units, tile.units);
    plan.grid_z = problem.D;
    plan.threads = cuda::tile_threads(tile);
    plan.smem_bytes = cuda::smem_bytes(role, problem.cell, math, tile, plan.stages);
    plan.us = kernel_us(problem, device, math, role, tile, plan, product, chunks);
    std::snprintf(text, sizeof text, "%s%dx%d %.1f us", tried.empty() ? "" : ", ", tile.units, tile.batch, plan.us);
    tried += text;
    if (best.threads == 0 || plan.us < best.us) best = plan;
  }
  if (best.threads == 0) throw std::invalid_argument(std::string(to_string(role)) + ": " + tried);
  if (best.grid_x > 0x7fffffff || best.grid_y > 0xffff) {
    throw std::invalid_argument(std::string(to_string(role)) + ": the grid exceeds what CUDA can launch");
  }
  notes += std::string(notes.empty() ? "" : "; ") + to_string(role) + " (units x batch): " + tried;
  return best;
}

std::vector<KernelRole> roles_of(const Problem& problem, Family family) {
  if (problem.dual) {
    if (problem.backward) return {KernelRole::kDualStateGrad, KernelRole::kDualBackward};
    if (problem.P != problem.H) return {KernelRole::kTangents, KernelRole::kProjectTangents};
    return {KernelRole::kTangents};
  }
  if (problem.backward) return {KernelRole::kStateGrad, cuda::backward_role(problem.modified)};
  std::vector<KernelRole> roles{cuda::forward_role(traits_of(family).reads_x, problem.modified)};
  if (problem.P != problem.H) roles.push_back(KernelRole::kProject);
  return roles;
}

}  // namespace

std::string single_obstacle(const Problem& problem, const DeviceInfo&) {
  if (problem.dual) return kNoDualKernels;
  if (problem.modified) return kNoModifiedKernels;
  return problem.T == 1 ? "" : "serves one time step, not " + std::to_string(problem.T);
}

std::string step_obstacle(const Problem&, const DeviceInfo&) { return ""; }

void plan_step_kernels(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  plan.pdl = device.compiled_for >= 90;
  plan.workspace_bytes = workspace_layout(problem).bytes;
  const bool projected = problem.P != problem.H;
  for (KernelRole role : roles_of(problem, plan.family)) {
    plan.kernels.push_back(plan_kernel(problem, device, math_of(problem, device), role, plan.reason));
    // Without a projection the gradient of a state is needed once, for h0.
    const bool of_state = role == KernelRole::kStateGrad || role == KernelRole::kDualStateGrad;
    if (!of_state || projected) plan.us_per_step += plan.kernels.back().us;
  }
}

WorkspaceLayout workspace_layout(const Problem& p) {
  const bool dual = p.dual && p.backward;  // running values and tangents
  const int64_t units = (dual ? 2 : 1) * p.D * p.B * p.H;
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  WorkspaceLayout layout{};
  const CellTraits cell = traits_of(p.cell);
  if (cell.has_c || (cell.reads_h && p.backward)) {
    layout.carry_bytes = units * (p.dtype == DType::kFloat64 ? 8 : 4);
  }
  layout.carry_h = aligned(layout.carry_bytes);
  if (p.modified && p.backward && !p.dual && !cell.reads_h)
    layout.carry_h_bytes = units * (p.dtype == DType::kFloat64 ? 8 : 4);
  layout.hidden = layout.carry_h + aligned(layout.carry_h_bytes);
  if (p.P != p.H && !p.backward) layout.hidden_bytes = units * dtype_size(p.dtype);
  layout.bytes = layout.hidden + aligned(layout.hidden_bytes);
  return layout;
}

std::string to_string(const std::vector<KernelPlan>& kernels) {
  std::string text;
  for (const KernelPlan& k : kernels) {
    const TileShape tile = cuda::tile_shape(k.role, k.math, k.tile);
    char line[256];
    const std::string stages = k.stages ? std::to_string(k.stages) + " stages, " : "";
    std::snprintf(line, sizeof line,
                  "  %s: %s, tile %d units x %d rows, grid %lld x %lld x %lld, %d threads, %s%d bytes of shared memory\n",
                  to_string(k.role), to_string(k.math), tile.units, tile.batch, static_cast<long long>(k.grid_x),
                  static_cast<long long>(k.grid_y), static_cast<long long>(k.grid_z), k.threads, stages.c_str(),
                  k.smem_bytes);
    text += line;
  }
  return text;
}

}  // namespace fused_rnn
