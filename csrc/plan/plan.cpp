// The planner: see plan.h. Tiles are chosen by a small cost model, whose constants are published figures; none is a
// measurement of these kernels.
#include "plan/plan.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "plan/persistent.h"

namespace fused_rnn {

using cuda::KernelRole;
using cuda::MathKind;
using cuda::TileShape;
using cuda::TileSize;

namespace {

constexpr double kClockGhz = 1.7;            // of the SMs, all generations
constexpr double kL2BytesPerClock = 64;      // into one SM
constexpr double kL2Share = 0.4;             // of that, when all SMs read at once (5.5 TB/s on an H100)
constexpr double kL2LatencyUs = 0.6;         // under load
constexpr double kLaunchUs = 2.1;            // from one launch in a stream to the next
constexpr double kOverlappedLaunchUs = 1.3;  // with programmatic dependent launch
constexpr double kBlockUs = 0.5;             // table, partial sums, pointwise part
constexpr int kReservedSmem = 1024;          // the system's share of a block's shared memory

constexpr KernelRole kAllForward[] = {KernelRole::kForward, KernelRole::kProject};
constexpr Family kAllFamilies[] = {Family::kCell, Family::kStep, Family::kGrid, Family::kCluster};
constexpr TileSize kAllTiles[] = {TileSize::kSmall, TileSize::kMedium, TileSize::kLarge};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiply-adds per clock and SM.
double math_rate(MathKind math, const DeviceInfo& device) {
  const int compute_capability = device.compute_capability;
  const bool server = compute_capability == 80 || compute_capability == 90 || compute_capability == 100;
  switch (math) {
    case MathKind::kFp64: return server ? 32 : 2;
    case MathKind::kFp32: return compute_capability == 75 || compute_capability == 80 ? 64 : 128;
    case MathKind::kTf32: return server ? 512 : 256;
    case MathKind::kBf16:
      if (device.compiled_for < 80) return 32;  // plain multiply-adds with conversions
      [[fallthrough]];
    default: return server ? 1024 : 512;
  }
}

// Size of the product that a kernel makes for every batch row and direction: units x (k[0] + k[1]).
struct Product {
  int64_t units;
  int64_t k[2];
};

Product product_of(const Problem& problem, KernelRole role) {
  const bool projected = problem.P != problem.H;
  const int64_t gates = gate_count(problem.cell);
  switch (role) {
    case KernelRole::kForward: return {problem.H, {problem.P, 0}};
    case KernelRole::kForwardInput: return {problem.H, {problem.P, problem.I}};
    case KernelRole::kProject: return {problem.P, {problem.H, 0}};
    case KernelRole::kBackward: return {problem.H, {projected ? problem.P : gates * problem.H, 0}};
    case KernelRole::kStateGrad: return {problem.P, {gates * problem.H, 0}};
  }
  throw std::invalid_argument("unknown kernel role");
}

// Stages of the ring: enough to hide the latency of L2 without keeping a second block from the SM; with overlapped launches as
// many as the product has chunks, since those are loaded while the preceding step still runs. 0: not even the fewest fit.
int choose_stages(const Problem& problem, const DeviceInfo& device, KernelRole role, MathKind math, const TileShape& tile,
                  int64_t chunks) {
  const auto bytes = [&](int stages) { return cuda::smem_bytes(role, problem.cell, math, tile, stages); };
  if (bytes(cuda::kMinStages) > device.smem_per_block) return 0;
  const int64_t per_team = ceil_div(chunks, tile.teams);
  const int most = device.compiled_for >= 90 ? cuda::kMaxStages : device.compiled_for >= 80 ? 4 : 2;
  const int wanted = static_cast<int>(std::clamp<int64_t>(per_team + 1, cuda::kMinStages, most));
  const int two_blocks = std::min(device.smem_per_block, device.smem_per_sm / 2 - kReservedSmem);
  int stages = cuda::kMinStages;
  while (stages < wanted && bytes(stages + 1) <= two_blocks) ++stages;
  if (stages == 2 && wanted > 2 && bytes(3) <= device.smem_per_block) stages = 3;
  return stages;
}

double kernel_us(const Problem& problem, const DeviceInfo& device, MathKind math, KernelRole role, const TileShape& tile,
                 const KernelPlan& plan, const Product& product, int64_t chunks) {
  const double rows = cuda::weight_groups(role, problem.cell) * tile.units, k = double(product.k[0] + product.k[1]);
  const double blocks = double(plan.grid_x) * plan.grid_y * plan.grid_z;
  const double per_sm = double(ceil_div(int64_t(blocks), device.sm_count));
  const double bytes = (rows + tile.batch) * k * cuda::storage_bytes(math);
  const double sm_us = per_sm * bytes / (kL2BytesPerClock * kClockGhz * 1e3);
  const double l2_us = blocks * bytes / (kL2BytesPerClock * kL2Share * device.sm_count * kClockGhz * 1e3);
  const double math_us = per_sm * rows * tile.batch * k / (math_rate(math, device) * kClockGhz * 1e3);
  const double latency_us = double(ceil_div(chunks, tile.teams)) * kL2LatencyUs / std::max(1, plan.stages - 1);
  const bool overlapped = device.compiled_for >= 90;
  return (overlapped ? kOverlappedLaunchUs : kLaunchUs) + kBlockUs + std::max({sm_us, l2_us, math_us, latency_us});
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
    plan.stages = choose_stages(problem, device, role, math, tile, chunks);
    if (plan.stages == 0) {
      std::snprintf(text, sizeof text, "%s%dx%d needs %d bytes of shared memory", tried.empty() ? "" : ", ", tile.units,
                    tile.batch, cuda::smem_bytes(role, problem.cell, math, tile, cuda::kMinStages));
      tried += text;
      continue;
    }
    plan.grid_x = ceil_div(problem.B, tile.batch);
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
  if (problem.backward) return {KernelRole::kStateGrad, KernelRole::kBackward};
  std::vector<KernelRole> roles(std::begin(kAllForward), std::end(kAllForward));
  if (family == Family::kCell) roles[0] = KernelRole::kForwardInput;
  if (problem.P == problem.H) roles.pop_back();
  return roles;
}

// Why a family cannot serve the problem; empty if it can.
std::string obstacle(const Problem& problem, const DeviceInfo& device, Family family) {
  if (is_persistent(family)) return persistent_obstacle(problem, device, family);
  if (family == Family::kCell && problem.T != 1) return "serves one time step, not " + std::to_string(problem.T);
  return "";
}

void check_problem(const Problem& p, const DeviceInfo& device) {
  if (p.T < 1 || p.B < 1 || p.H < 1 || p.P < 1 || p.I < 0 || p.D < 1 || p.D > 2) {
    throw std::invalid_argument("a layer needs T, B, H, P >= 1, I >= 0 and 1 or 2 directions");
  }
  if (p.P != p.H && p.cell != CellKind::kLstm) throw std::invalid_argument("only an LSTM can have a projection");
  if (p.P > p.H) throw std::invalid_argument("proj_size must be smaller than the hidden size");
  if (device.compute_capability < 75) {
    throw std::invalid_argument("compute capability " + capability_text(device.compute_capability) + " is older than 7.5");
  }
  if (device.compiled_for < 75) {
    throw std::invalid_argument("the kernels were not compiled for compute capability " +
                                capability_text(device.compute_capability) + ", nor to PTX that it can run: add it to " +
                                "TORCH_CUDA_ARCH_LIST and build again");
  }
}

}  // namespace

std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

const char* to_string(Family family) {
  switch (family) {
    case Family::kCell: return "cell";
    case Family::kStep: return "step";
    case Family::kGrid: return "grid";
    case Family::kCluster: return "cluster";
  }
  return "?";
}

const char* to_string(KernelRole role) {
  switch (role) {
    case KernelRole::kForward: return "forward";
    case KernelRole::kForwardInput: return "forward_input";
    case KernelRole::kProject: return "project";
    case KernelRole::kBackward: return "backward";
    case KernelRole::kStateGrad: return "state_grad";
  }
  return "?";
}

FamilyChoice parse_choice(const std::string& name) {
  if (name == "cheapest") return {std::nullopt, true};
  for (Family family : kAllFamilies) {
    if (name == to_string(family)) return {family, false};
  }
  throw std::invalid_argument("unknown kernel family '" + name +
                              "'; known are: cell, step, grid, cluster, and cheapest of them");
}

WorkspaceLayout workspace_layout(const Problem& p) {
  const int64_t units = p.D * p.B * p.H;
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  WorkspaceLayout layout{};
  const CellTraits cell = traits_of(p.cell);
  if (cell.has_c || (cell.reads_h && p.backward)) {
    layout.carry_bytes = units * (p.dtype == DType::kFloat64 ? 8 : 4);
  }
  layout.hidden = aligned(layout.carry_bytes);
  if (p.P != p.H && !p.backward) layout.hidden_bytes = units * dtype_size(p.dtype);
  layout.bytes = layout.hidden + aligned(layout.hidden_bytes);
  return layout;
}

namespace {

// What families other than kCell leave to a matrix product of the caller.
double projection_us(const Problem& p, const DeviceInfo& device, MathKind math) {
  const double rows = double(p.T) * p.B, columns = double(gate_count(p.cell)) * p.H, inputs = double(p.I);
  const double bytes = (rows * (columns + inputs) + columns * inputs) * dtype_size(p.dtype);
  const double math_us = rows * columns * inputs / (math_rate(math, device) * device.sm_count * kClockGhz * 1e3);
  const double l2_us = bytes / (kL2BytesPerClock * kL2Share * device.sm_count * kClockGhz * 1e3);
  return p.D * (kLaunchUs + std::max(math_us, l2_us));
}

// Kernels, memory and cost of a family that has no obstacle.
Plan plan_of(const Problem& problem, const DeviceInfo& device, MathKind math, Family family) {
  Plan plan{};
  plan.family = family;
  if (is_persistent(family)) {
    plan_persistent(problem, device, plan);
  } else {
    plan.pdl = device.compiled_for >= 90;
    plan.workspace_bytes = workspace_layout(problem).bytes;
    const bool projected = problem.P != problem.H;
    for (KernelRole role : roles_of(problem, family)) {
      plan.kernels.push_back(plan_kernel(problem, device, math, role, plan.reason));
      // Without a projection the gradient of a state is needed once, for h0.
      if (role != KernelRole::kStateGrad || projected) plan.us_per_step += plan.kernels.back().us;
    }
  }
  plan.us = plan.us_once + problem.T * plan.us_per_step;
  if (!problem.backward && family != Family::kCell) plan.us += projection_us(problem, device, math);
  return plan;
}

// Of the plans of the families that can serve the problem, in their order; null if it may be none of them.
const Plan* choose(const std::vector<Plan>& plans, const FamilyChoice& choice) {
  const Plan* chosen = nullptr;
  for (const Plan& plan : plans) {
    if (choice.forced ? plan.family != *choice.forced : !choice.cheapest && is_persistent(plan.family)) continue;
    if (!chosen || (choice.cheapest && plan.us < chosen->us)) chosen = &plan;
  }
  return chosen;
}

// Why another plan than this is taken.
std::string rejection(const Plan& plan, const Plan* chosen, const FamilyChoice& choice) {
  if (choice.forced) return std::string(to_string(*choice.forced)) + " is forced";
  const std::string name = to_string(plan.family);
  if (choice.cheapest) {
    char text[100];
    std::snprintf(text, sizeof text, "%.1f us expected for the layer, %s takes %.1f", plan.us, to_string(chosen->family),
                  chosen->us);
    return text;
  }
  if (is_persistent(plan.family)) {
    return "never run on a GPU yet, so it is taken only when asked for (FUSED_RNN_PLAN=" + name + " or cheapest)";
  }
  return std::string(to_string(chosen->family)) + " serves it with one launch less";
}

}  // namespace

Plan make_plan(const Problem& problem, const DeviceInfo& device, const FamilyChoice& choice) {
  check_problem(problem, device);
  // TF32 needs code for sm_80; before it, torch's permission to use it changes nothing.
  const MathKind math = cuda::math_kind(problem.dtype, problem.allow_tf32 && device.compiled_for >= 80);
  std::vector<Plan> plans;
  std::vector<Rejection> rejected;
  std::vector<Candidate> candidates;
  for (Family family : kAllFamilies) {
    std::string reason = obstacle(problem, device, family);
    if (reason.empty()) {
      try {
        plans.push_back(plan_of(problem, device, math, family));
        const Plan& plan = plans.back();
        candidates.push_back({family, plan.us_per_step, plan.us, plan.persistent});
      } catch (const std::invalid_argument& error) {
        reason = error.what();
      }
    }
    if (!reason.empty()) rejected.push_back({family, reason});
  }
  const Plan* const chosen = choose(plans, choice);
  for (const Plan& plan : plans) {
    if (&plan != chosen) rejected.push_back({plan.family, rejection(plan, chosen, choice)});
  }
  std::sort(rejected.begin(), rejected.end(),
            [](const Rejection& a, const Rejection& b) { return static_cast<int>(a.family) < static_cast<int>(b.family); });
  if (!chosen) {
    std::string message = choice.forced
                              ? std::string("kernel family ") + to_string(*choice.forced) + " cannot serve this layer"
                              : "no kernel family can serve this layer";
    for (const Rejection& one : rejected) {
      if (choice.forced && one.family != *choice.forced) continue;
      message += std::string(": ") + to_string(one.family) + " " + one.reason;
    }
    throw std::invalid_argument(message);
  }
  Plan plan = *chosen;
  if (choice.forced || choice.cheapest) {
    plan.reason = std::string(to_string(plan.family)) +
                  (choice.forced ? " is forced; " : " is the cheapest by the cost model; ") + plan.reason;
  }
  plan.rejected = std::move(rejected);
  const auto cheaper = [](const Candidate& a, const Candidate& b) { return a.us < b.us; };
  plan.cheapest = std::min_element(candidates.begin(), candidates.end(), cheaper)->family;
  plan.candidates = std::move(candidates);
  return plan;
}

std::string to_string(const Plan& plan) {
  static constexpr const char* kMathNames[] = {"fp64", "fp32", "tf32", "fp16", "bf16"};
  char line[256];
  std::snprintf(line, sizeof line, "family %s, %.1f us per step expected (model, not measured), workspace %lld bytes%s\n",
                to_string(plan.family), plan.us_per_step, static_cast<long long>(plan.workspace_bytes),
                plan.pdl ? ", overlapped launches" : "");
  std::string text = line;
  for (const KernelPlan& k : plan.kernels) {
    const TileShape tile = cuda::tile_shape(k.role, k.math, k.tile);
    std::snprintf(
        line, sizeof line,
        "  %s: %s, tile %d units x %d rows, grid %lld x %lld x %lld, %d threads, %d stages, %d bytes of shared memory\n",
        to_string(k.role), kMathNames[static_cast<int>(k.math)], tile.units, tile.batch, static_cast<long long>(k.grid_x),
        static_cast<long long>(k.grid_y), static_cast<long long>(k.grid_z), k.threads, k.stages, k.smem_bytes);
    text += line;
  }
  if (plan.persistent) text += to_string(*plan.persistent);
  text += "  because " + plan.reason + "\n";
  text += "  could serve, us per step (for the layer) by the model:";
  for (const Candidate& c : plan.candidates) {
    std::snprintf(line, sizeof line, "%s %s %.2f (%.1f)", c.family == plan.candidates[0].family ? "" : ",",
                  to_string(c.family), c.us_per_step, c.us);
    text += line;
  }
  text += std::string("; cheapest: ") + to_string(plan.cheapest) + "\n";
  for (const Rejection& r : plan.rejected) text += std::string("  not ") + to_string(r.family) + ": " + r.reason + "\n";
  return text;
}

}  // namespace fused_rnn
