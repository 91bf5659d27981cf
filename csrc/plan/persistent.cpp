// Capacity of the persistent families: do the weights of a layer fit the registers and the shared memory of the blocks of one
// group, and how many groups run at once. The times are a model; nothing here has been measured.
#include "plan/persistent.h"

#include <algorithm>
#include <cstdio>

#include "plan/persistent_geometry.h"

namespace fused_rnn {

using cuda::MathKind;
using cuda::PersistentShape;

namespace {

// kStepUs, kClusterHandOffUs and kTurnsHandOffUs are latencies of the machine code (LSTM, 16 bit, one tile, sm_90a): its stall
// counts along the path of one warp, with 280 clocks for a load from L2 and 30 from shared memory. The others are published figures.
constexpr double kClockGhz = 1.7;
constexpr double kLaunchUs = 2.1;           // from one launch in a stream to the next
constexpr double kL2HandOffUs = 0.75;       // a store and the load that sees it: 160 ns one way, 600 ns under load
constexpr double kClusterHandOffUs = 0.42;  // from a push to the next product; the push and its barrier alone take 0.25
constexpr double kTurnsHandOffUs = 0.27;    // the same where half of the threads load ahead meanwhile
constexpr double kL2BytesPerClock = 25;     // into one SM while all SMs read (5.5 TB/s on an H100)
constexpr double kSmemBytesPerClock = 128;
constexpr double kStepUs = 0.4;       // partial sums, block barrier, pointwise part
constexpr int kLargestUnitTiles = 3;  // that kernels are compiled for
constexpr int kRegisters = 256 * cuda::kPersistentThreads;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A fit of the problem: unit_tiles == 0 if there is none, and then `reason`.
struct Fit {
  PersistentPlan plan;
  std::string reason;
};

// Bytes that a block moves through its shared memory in a step, for one tile of rows; `grid`: without the exchange.
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

// How often blocks run that together take the device: clusters that do not fit at once wait inside the launch.
int64_t turns(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  return s.cluster ? ceil_div(plan.groups * plan.directions, clusters_at_once(device, plan.slices)) : plan.launches;
}

double step_us(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  const double exchange = s.cluster ? 0 : cuda::exchange_words(s, plan.slices) * 8.0 / kL2BytesPerClock;
  // Multiply-adds of a block: fragments of 16 rows by one chunk, times 8 batch rows.
  const double fragments = plan.weight_bytes / double(cuda::kFragmentBytes);
  const double products =
      fragments * cuda::kTileUnits * cuda::chunk_step(s.math) * cuda::kTileRows / persistent_math_rate(s.math, device);
  // Products hide behind the reading of the weights, or that behind them; neither before the states have come.
  const double clocks = std::max({exchange, smem_traffic(s, plan) / kSmemBytesPerClock, products});
  const double hand_off = !s.cluster ? kL2HandOffUs : cuda::takes_turns(s) ? kTurnsHandOffUs : kClusterHandOffUs;
  return turns(s, plan, device) * (plan.tiles * (kStepUs + clocks / (kClockGhz * 1e3)) + hand_off);
}

// What each turn does before its first step: the launch (`grid` clears its exchange first) and the loading of the weights.
double once_us(const PersistentShape& s, const PersistentPlan& plan, const DeviceInfo& device) {
  const double weights = turns(s, plan, device) * plan.weight_bytes / (kL2BytesPerClock * kClockGhz * 1e3);
  return plan.launches * kLaunchUs * (s.cluster ? 1 : 2) + weights;
}

// The largest number of batch tiles of a group, up to `wanted`, whose states fit the shared memory; 0: not even one.
int fitting_tiles(const PersistentShape& shape, const DeviceInfo& device, int slices, int64_t wanted) {
  int tiles = static_cast<int>(std::min<int64_t>(wanted, cuda::kMaxBatchTiles));
  while (tiles > 0 && cuda::persistent_smem(shape, slices, tiles).total > device.smem_per_block) --tiles;
  return tiles;
}

// Weights of one slice: registers and shared memory of the block are what a slice may use.
std::string capacity_text(const PersistentShape& shape, const DeviceInfo& device, int slices) {
  char text[200];
  std::snprintf(text, sizeof text,
                "%d blocks of %d units need %d bytes of shared memory each beside the registers, the device has %d", slices,
                cuda::slice_units(shape), cuda::persistent_smem(shape, slices, 1).total, device.smem_per_block);
  return text;
}

void fill(PersistentPlan& plan, const PersistentShape& shape) {
  plan.math = shape.math;
  plan.unit_tiles = shape.unit_tiles;
  const cuda::FragmentCount fragments = cuda::fragment_count(shape, plan.slices);
  constexpr int kBytes = cuda::kPersistentWarps * cuda::kFragmentBytes;
  plan.weight_bytes = fragments.total * kBytes;
  plan.weight_bytes_in_registers = fragments.in_registers * kBytes;
  plan.weight_bytes_in_smem = fragments.in_smem * kBytes;
  plan.smem_bytes = cuda::persistent_smem(shape, plan.slices, plan.tiles).total;
}

// All blocks of a launch run at once, one on each SM; what does not fit takes further launches.
Fit fit_grid(const Problem& problem, const DeviceInfo& device, MathKind math) {
  const PersistentShape shape{problem.cell, math, 1, problem.backward, false};
  Fit fit{};
  const int64_t slices = ceil_div(problem.H, cuda::slice_units(shape));
  if (slices > device.sm_count) {
    fit.reason = "needs " + std::to_string(slices) + " SMs at once, one for every 16 hidden units; the device has " +
                 std::to_string(device.sm_count);
    return fit;
  }
  const int64_t at_once = device.sm_count / slices, batch_tiles = ceil_div(problem.B, cuda::kTileRows);
  fit.plan.slices = static_cast<int>(slices);
  fit.plan.directions = at_once >= problem.D ? problem.D : 1;
  const int64_t most_groups = at_once / fit.plan.directions;
  fit.plan.tiles = fitting_tiles(shape, device, fit.plan.slices, ceil_div(batch_tiles, most_groups));
  if (fit.plan.tiles == 0) {
    fit.reason = capacity_text(shape, device, fit.plan.slices);
    return fit;
  }
  const int64_t groups = ceil_div(batch_tiles, fit.plan.tiles);
  fit.plan.groups = static_cast<int>(std::min(groups, most_groups));
  fit.plan.launches = static_cast<int>(ceil_div(groups, fit.plan.groups) * (problem.D / fit.plan.directions));
  fill(fit.plan, shape);
  return fit;
}

// Clusters are independent: more than fit at once wait for their turn inside one launch. Blocks of more units make smaller
// clusters, of which more run at once, and clusters of more rows are fewer: the cost model says what is best.
Fit fit_cluster(const Problem& problem, const DeviceInfo& device, MathKind math) {
  Fit best{};
  double best_us = 0;
  for (int unit_tiles = 1; unit_tiles <= kLargestUnitTiles; ++unit_tiles) {
    const PersistentShape shape{problem.cell, math, unit_tiles, problem.backward, true};
    const int slices = static_cast<int>(ceil_div(problem.H, cuda::slice_units(shape)));
    if (clusters_at_once(device, slices) == 0) {
      if (best.plan.unit_tiles) continue;
      best.reason = "needs a cluster of " + std::to_string(slices) + " blocks of " +
                    std::to_string(cuda::slice_units(shape)) + " units, the device ";
      best.reason += slices > device.max_cluster ? "has clusters of " + std::to_string(device.max_cluster)
                                                 : "cannot run one of that size";
      continue;
    }
    const int64_t batch_tiles = ceil_div(problem.B, cuda::kTileRows);
    const int most_tiles = fitting_tiles(shape, device, slices, batch_tiles);
    if (most_tiles == 0 && !best.plan.unit_tiles) best.reason = capacity_text(shape, device, slices);
    for (int tiles = 1; tiles <= most_tiles; ++tiles) {
      PersistentPlan plan{};
      plan.slices = slices;
      plan.tiles = tiles;
      plan.groups = static_cast<int>(ceil_div(batch_tiles, tiles));
      plan.directions = problem.D;
      plan.launches = 1;
      fill(plan, shape);
      const double us = step_us(shape, plan, device);
      if (best.plan.unit_tiles && us >= best_us) continue;
      best.plan = plan;
      best_us = us;
    }
  }
  return best;
}

Fit fit_family(const Problem& problem, const DeviceInfo& device, Family family) {
  const int needed = family == Family::kGrid ? 80 : 90;
  Fit fit{};
  if (device.compute_capability < needed) {
    fit.reason = "needs compute capability " + capability_text(needed);
  } else if (device.compiled_for < needed) {
    fit.reason = "needs code for compute capability " + capability_text(needed) + ", this build's for the device is for " +
                 capability_text(device.compiled_for) + ": add " + capability_text(device.compute_capability) +
                 " to TORCH_CUDA_ARCH_LIST and build again";
  } else if (problem.dtype == DType::kFloat64) {
    fit.reason = "has no fp64 kernels";
  } else if (problem.P != problem.H) {
    fit.reason = "has no projection";
  } else if (!numbers_rows(problem)) {
    fit.reason = "numbers the rows of all steps with 32 bits";
  } else if (device.registers_per_sm < kRegisters) {
    fit.reason = "needs " + std::to_string(kRegisters) + " registers of an SM";
  } else {
    const MathKind math = cuda::math_kind(problem.dtype, problem.allow_tf32);
    fit = family == Family::kGrid ? fit_grid(problem, device, math) : fit_cluster(problem, device, math);
  }
  return fit;
}

}  // namespace

// Tensor cores by mma.sync, which reaches 63% of Hopper's peak.
double persistent_math_rate(MathKind math, const DeviceInfo& device) {
  const int capability = device.compute_capability;
  if (math == MathKind::kFp32) return capability == 80 ? 64 : 128;
  const double half = capability == 80 ? 1024 : capability == 90 || capability == 100 ? 1290 : 512;
  return math == MathKind::kTf32 ? half / 2 : half;
}

// Clusters do not span the device's groups of SMs, of which some are incomplete: 7 clusters of 16 blocks fit an H100, 15 of 8.
int64_t clusters_at_once(const DeviceInfo& device, int64_t blocks) {
  if (blocks > std::min(device.max_cluster, cuda::kMaxClusterBlocks)) return 0;
  if (device.active_clusters[1] > 0) return device.active_clusters[blocks];
  const int64_t all = device.sm_count / blocks;
  return blocks >= 8 && all > 1 ? all - 1 : all;
}
static_assert(std::tuple_size<decltype(DeviceInfo::active_clusters)>::value == cuda::kMaxClusterBlocks + 1);

bool numbers_rows(const Problem& problem) { return problem.T + 8 < (int64_t{1} << 31) / std::max<int64_t>(problem.B, 1); }

std::string persistent_obstacle(const Problem& problem, const DeviceInfo& device, Family family) {
  const Fit fit = fit_family(problem, device, family);
  return fit.plan.unit_tiles ? "" : fit.reason;
}

void plan_persistent(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const Fit fit = fit_family(problem, device, plan.family);
  const PersistentShape shape{problem.cell, fit.plan.math, fit.plan.unit_tiles, problem.backward,
                              plan.family == Family::kCluster};
  plan.persistent = fit.plan;
  plan.pdl = false;
  plan.workspace_bytes = 0;
  if (plan.family == Family::kGrid) {
    plan.workspace_bytes =
        fit.plan.groups * fit.plan.directions * cuda::grid_exchange_bytes(shape, fit.plan.slices, fit.plan.tiles);
  }
  plan.us_per_step = step_us(shape, fit.plan, device);
  plan.us_once = once_us(shape, fit.plan, device);
  plan.reason = "it has run in the simulator only, never on a GPU";
}

std::string to_string(const PersistentPlan& p) {
  static constexpr const char* kMathNames[] = {"fp64", "fp32", "tf32", "fp16", "bf16"};
  char text[400];
  std::snprintf(
      text, sizeof text,
      "  persistent: %s, %d launch%s of %d direction%s x %d group%s x %d blocks, each of %d units and %d tile%s of 8 "
      "rows; of %d bytes of weights %d in registers, %d in shared memory; %d bytes of shared memory\n",
      kMathNames[static_cast<int>(p.math)], p.launches, p.launches == 1 ? "" : "es", p.directions,
      p.directions == 1 ? "" : "s", p.groups, p.groups == 1 ? "" : "s", p.slices, p.unit_tiles * cuda::kTileUnits, p.tiles,
      p.tiles == 1 ? "" : "s", p.weight_bytes, p.weight_bytes_in_registers, p.weight_bytes_in_smem, p.smem_bytes);
  return text;
}

}  // namespace fused_rnn
