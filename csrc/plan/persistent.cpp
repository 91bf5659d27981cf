// Capacity of the persistent families: whether the weights of a layer fit the registers and the shared memory of the blocks
// of one group, and how many groups run at once. The times are those of the cost model (machine.h).
#include "plan/persistent.h"

#include <algorithm>
#include <cstdio>

#include "core/ceil_div.h"
#include "plan/machine.h"
#include "plan/persistent_geometry.h"

namespace fused_rnn {

using cuda::MathKind;
using cuda::PersistentShape;

namespace {

constexpr int kLargestUnitTiles = 3;  // of a block of a cluster: the largest for which kernels are compiled
constexpr int kRegisters = 65536;     // of the largest blocks

// How a family holds the weights; without a plan `reason` says why it cannot.
struct Fit {
  std::optional<PersistentPlan> plan;
  std::string reason;
};

PersistentShape shape_of(const Problem& problem, const PersistentPlan& plan) {
  return {problem.cell, plan.math, plan.unit_tiles, problem.backward, plan.cluster};
}

// Bytes that a block moves through its shared memory in a step, for one row tile; in `grid` the exchange goes through L2
// instead.
double smem_traffic(const PersistentShape& s, const PersistentPlan& plan) {
  const double weights = plan.weight_bytes_in_smem;
  if (cuda::scatters(s)) {
    const double own = cuda::scatter_chunks(s) * cuda::own_words(s.math) * 4.0;
    return weights + (cuda::kPersistentWarps + 1) * own + 2 * 4.0 * cuda::scatter_floats(s, plan.slices);
  }
  const double sums = 2.0 * cuda::k_groups(s) * cuda::partial_floats(s) * 4;
  const double states = s.cluster ? (1.0 + cuda::m_groups(s)) * cuda::exchange_words(s, plan.slices) * 4 : 0;
  return weights + sums + states;
}

// How many times in a row the device is filled with blocks. Clusters that do not fit at once wait inside the launch.
int64_t turns(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  return s.cluster ? ceil_div(plan.groups * plan.directions, clusters_at_once(device, plan.slices)) : plan.launches;
}

double step_us(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  const double exchange = s.cluster ? 0 : cuda::exchange_words(s, plan.slices) * 8.0 / kSharedL2BytesPerClock;
  // Multiply-adds of a block: fragments of 16 rows by one chunk, times 8 batch rows.
  const double fragments = plan.weight_bytes / double(cuda::kFragmentBytes);
  const double products =
      fragments * cuda::kTileUnits * cuda::chunk_step(s.math) * cuda::kTileRows / persistent_math_rate(s.math, device);
  // Products and the reading of the weights hide behind each other. Both begin when the states have come.
  const double clocks = std::max({exchange, smem_traffic(s, plan) / kSmemBytesPerClock, products});
  const double hand_off = !s.cluster ? kL2HandOffUs : cuda::takes_turns(s) ? kTurnsHandOffUs : kClusterHandOffUs;
  return turns(s, plan, device) * (plan.row_tiles * (kStepUs + clocks / (kClockGhz * 1e3)) + hand_off);
}

// What each turn does before its first step: the launch (`grid` clears its exchange first) and the loading of the weights.
double once_us(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  const double weights = turns(s, plan, device) * plan.weight_bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3);
  return plan.launches * kLaunchUs * (s.cluster ? 1 : 2) + weights;
}

// The largest number of row tiles of a group, up to `wanted`, whose states fit the shared memory; 0: not even one.
int fitting_row_tiles(const PersistentShape& shape, const DeviceInfo& device, int slices, int64_t wanted) {
  int row_tiles = static_cast<int>(std::min<int64_t>(wanted, cuda::kMaxRowTiles));
  while (row_tiles > 0 && cuda::persistent_smem(shape, slices, row_tiles).total > device.smem_per_block) --row_tiles;
  return row_tiles;
}

// Why a slice does not fit its block.
std::string capacity_text(const PersistentShape& shape, const DeviceInfo& device, int slices) {
  char text[200];
  std::snprintf(text, sizeof text,
                "%d blocks of %d units need %d bytes of shared memory each beside the registers, the device has %d", slices,
                cuda::slice_units(shape), cuda::persistent_smem(shape, slices, 1).total, device.smem_per_block);
  return text;
}

// A plan of one launch; its groups and launches are the caller's to count.
PersistentPlan held_by(const PersistentShape& shape, int slices, int row_tiles, int directions) {
  PersistentPlan plan{};
  plan.math = shape.math;
  plan.cluster = shape.cluster;
  plan.unit_tiles = shape.unit_tiles;
  plan.slices = slices;
  plan.row_tiles = row_tiles;
  plan.threads = cuda::kPersistentThreads;
  plan.units = cuda::slice_units(shape);
  plan.rows = row_tiles * cuda::kTileRows;
  plan.directions = directions;
  plan.launches = 1;
  const cuda::FragmentCount fragments = cuda::fragment_count(shape, slices);
  constexpr int kBytes = cuda::kPersistentWarps * cuda::kFragmentBytes;
  plan.weight_bytes = fragments.total * kBytes;
  plan.weight_bytes_in_registers = fragments.in_registers * kBytes;
  plan.weight_bytes_in_smem = fragments.in_smem * kBytes;
  plan.smem_bytes = cuda::persistent_smem(shape, slices, row_tiles).total;
  return plan;
}

// All blocks of a launch run at once, one on each SM. Groups that do not fit take further launches.
Fit fit_grid(const Problem& problem, const DeviceInfo& device) {
  if (const std::string reason = general_obstacle(problem, device, 80); !reason.empty()) return {std::nullopt, reason};
  const PersistentShape shape{problem.cell, math_of(problem, device), 1, problem.backward, false};
  const int64_t slices = ceil_div(problem.H, cuda::slice_units(shape));
  const int resident = device.resident_blocks == 0 ? device.sm_count : std::max(device.resident_blocks, 0);
  if (slices > resident) {
    return {std::nullopt, "needs " + std::to_string(slices) +
                              " SMs at once, one for every 16 hidden units; the device has " + std::to_string(resident) +
                              (resident < device.sm_count ? " for its blocks" : "")};
  }
  const int64_t at_once = resident / slices, all_row_tiles = ceil_div(problem.B, cuda::kTileRows);
  const int directions = at_once >= problem.D ? problem.D : 1, blocks = static_cast<int>(slices);
  const int64_t most_groups = at_once / directions;
  const int row_tiles = fitting_row_tiles(shape, device, blocks, ceil_div(all_row_tiles, most_groups));
  if (row_tiles == 0) return {std::nullopt, capacity_text(shape, device, blocks)};
  PersistentPlan plan = held_by(shape, blocks, row_tiles, directions);
  const int64_t groups = ceil_div(all_row_tiles, row_tiles);
  plan.groups = static_cast<int>(std::min(groups, most_groups));
  plan.launches = static_cast<int>(ceil_div(groups, plan.groups) * (problem.D / directions));
  return {plan, ""};
}

// Clusters are independent: those that do not fit at once wait for their turn inside the launch. Blocks of more units make
// smaller clusters, of which more run at once; more row tiles make fewer clusters. The cost model says what is best.
Fit fit_cluster(const Problem& problem, const DeviceInfo& device) {
  if (const std::string reason = general_obstacle(problem, device, 90); !reason.empty()) return {std::nullopt, reason};
  Fit best;
  double best_us = 0;
  for (int unit_tiles = 1; unit_tiles <= kLargestUnitTiles; ++unit_tiles) {
    const PersistentShape shape{problem.cell, math_of(problem, device), unit_tiles, problem.backward, true};
    const int slices = static_cast<int>(ceil_div(problem.H, cuda::slice_units(shape)));
    if (clusters_at_once(device, slices) == 0) {
      best.reason = "needs a cluster of " + std::to_string(slices) + " blocks of " +
                    std::to_string(cuda::slice_units(shape)) + " units, the device ";
      best.reason += slices > device.max_cluster ? "has clusters of " + std::to_string(device.max_cluster)
                                                 : "cannot run one of that size";
      continue;
    }
    const int64_t all_row_tiles = ceil_div(problem.B, cuda::kTileRows);
    const int most = fitting_row_tiles(shape, device, slices, all_row_tiles);
    if (most == 0) best.reason = capacity_text(shape, device, slices);
    for (int row_tiles = 1; row_tiles <= most; ++row_tiles) {
      PersistentPlan plan = held_by(shape, slices, row_tiles, problem.D);
      plan.groups = static_cast<int>(ceil_div(all_row_tiles, row_tiles));
      const double us = step_us(shape, plan, device);
      if (best.plan && us >= best_us) continue;
      best.plan = plan;
      best_us = us;
    }
  }
  return best;
}

std::string obstacle_of(const Fit& fit) { return fit.plan ? "" : fit.reason; }

void fill_in(const Problem& problem, const DeviceInfo& device, const PersistentPlan& persistent, Plan& plan) {
  const PersistentShape shape = shape_of(problem, persistent);
  plan.persistent = persistent;
  plan.pdl = false;
  plan.workspace_bytes = 0;
  plan.us_per_step = step_us(shape, persistent, device);
  plan.us_once = once_us(shape, persistent, device);
  plan.reason = kOnlySimulated;
}

}  // namespace

std::string general_obstacle(const Problem& problem, const DeviceInfo& device, int needed) {
  if (device.compute_capability < needed) return "needs compute capability " + capability_text(needed);
  if (device.compiled_for < needed) {
    return "needs code for compute capability " + capability_text(needed) + ", this build's for the device is for " +
           capability_text(device.compiled_for) + ": add " + capability_text(device.compute_capability) +
           " to TORCH_CUDA_ARCH_LIST and build again";
  }
  if (problem.dual) return kNoDualKernels;
  if (problem.modified) return kNoModifiedKernels;
  if (problem.dtype == DType::kFloat64) return "has no fp64 kernels";
  if (problem.P != problem.H) return "has no projection";
  if (!numbers_rows(problem)) return "numbers the rows of all steps with 32 bits";
  if (device.registers_per_sm < kRegisters) return "needs " + std::to_string(kRegisters) + " registers of an SM";
  return "";
}

bool numbers_rows(const Problem& problem) { return problem.T + 8 < (int64_t{1} << 31) / std::max<int64_t>(problem.B, 1); }

std::string grid_obstacle(const Problem& problem, const DeviceInfo& device) {
  return obstacle_of(fit_grid(problem, device));
}
std::string cluster_obstacle(const Problem& problem, const DeviceInfo& device) {
  return obstacle_of(fit_cluster(problem, device));
}

void plan_grid(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const PersistentPlan p = fit_grid(problem, device).plan.value();
  fill_in(problem, device, p, plan);
  // Of the exchange.
  plan.workspace_bytes = p.groups * p.directions * cuda::grid_exchange_bytes(shape_of(problem, p), p.slices, p.row_tiles);
}

void plan_cluster(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  fill_in(problem, device, fit_cluster(problem, device).plan.value(), plan);
}

std::string to_string(const PersistentPlan& p) {
  char text[400];
  std::snprintf(
      text, sizeof text,
      "  persistent: %s, %d launch%s of %d direction%s x %d group%s x %d block%s, each of %d units and %d tile%s of %d "
      "rows; of %d bytes of weights %d in registers, %d in shared memory; %d bytes of shared memory\n",
      to_string(p.math), p.launches, p.launches == 1 ? "" : "es", p.directions, p.directions == 1 ? "" : "s", p.groups,
      p.groups == 1 ? "" : "s", p.slices, p.slices == 1 && p.unit_tiles == 0 ? "" : "s", p.units, p.row_tiles,
      p.row_tiles == 1 ? "" : "s", p.rows / p.row_tiles, p.weight_bytes, p.weight_bytes_in_registers, p.weight_bytes_in_smem,
      p.smem_bytes);
  return text;
}

}  // namespace fused_rnn
