// The planner of family `block`: whether one block holds all weights of a layer's direction, and how many batch rows it
// serves. The times are those of the cost model (machine.h).
#include "plan/block_geometry.h"

#include <algorithm>
#include <string>

#include "plan/machine.h"
#include "plan/persistent.h"

namespace fused_rnn {

using cuda::BlockShape;
using cuda::MathKind;

namespace {

// Without a plan `reason` says why there is none.
struct Fit {
  std::optional<PersistentPlan> plan;
  std::string reason;
  double us = 0;  // of a step
};

// Blocks that do not fit at once wait inside the launch. The model takes an SM to run one at a time.
int64_t turns(const PersistentPlan& plan, const DeviceInfo& device) {
  return ceil_div(int64_t{plan.groups} * plan.directions, device.sm_count);
}

// A step of one block: the product, then the pointwise part, in all warps together; and the latencies of one warp's path.
double step_us(BlockShape s, const PersistentPlan& plan, const Problem& problem, const DeviceInfo& device) {
  const int warps = plan.threads / 32;
  const double fragments = double(warps) * cuda::block_chunks(s, problem.H) * cuda::block_tiles(s);
  const int columns = s.math == MathKind::kFp32 ? plan.rows : 8;  // of batch rows that are computed
  const double products =
      fragments * 16 * cuda::block_chunk_step(s.math) * columns / persistent_math_rate(s.math, device);
  const double states = double(warps) * cuda::block_chunks(s, problem.H) * cuda::block_chunk_words(s) * 4;
  const double smem = (states + plan.weight_bytes_in_smem) / kSmemBytesPerClock;
  const double instructions = s.backward ? kBackwardInstructions : kForwardInstructions;
  const double pointwise =
      instructions * state_count(s.cell) * plan.units * plan.rows / 128;  // lanes of the four schedulers
  const double clocks = kBlockStepClocks + std::max(products, smem) + pointwise;
  return turns(plan, device) * clocks / (kClockGhz * 1e3);
}

Fit fit(const Problem& problem, const DeviceInfo& device) {
  Fit best;
  best.reason = general_obstacle(problem, device, 80);
  if (!best.reason.empty()) return best;
  for (int columns : {2, 1}) {
    const BlockShape shape{problem.cell, math_of(problem, device), problem.backward, columns};
    if (problem.H > cuda::max_block_units(shape)) {
      best.reason = "has up to " + std::to_string(cuda::max_block_units(shape)) + " hidden units in a block";
      return best;
    }
    const int smem = cuda::block_smem(shape, problem.H).total;
    if (smem > device.smem_per_block) {
      best.reason = "needs " + std::to_string(smem) + " bytes of shared memory beside the registers, the device has " +
                    std::to_string(device.smem_per_block);
      continue;
    }
    PersistentPlan plan{};
    const int warps = cuda::block_warps(shape, problem.H), chunks = cuda::block_chunks(shape, problem.H);
    const int bytes = warps * cuda::block_tiles(shape) * cuda::kFragmentWords * 4;  // of a chunk
    plan.math = shape.math;
    plan.slices = plan.row_tiles = plan.launches = 1;
    plan.threads = 32 * warps;
    plan.units = warps * cuda::warp_units(shape);
    plan.rows = cuda::block_rows(shape);
    plan.groups = static_cast<int>(ceil_div(problem.B, plan.rows));
    plan.directions = problem.D;
    plan.weight_bytes = chunks * bytes;
    plan.weight_bytes_in_smem = cuda::block_smem_chunks(shape, problem.H) * bytes;
    plan.weight_bytes_in_registers = plan.weight_bytes - plan.weight_bytes_in_smem;
    plan.smem_bytes = smem;
    const double us = step_us(shape, plan, problem, device);
    if (best.plan && us >= best.us) continue;
    best.plan = plan;
    best.us = us;
  }
  return best;
}

}  // namespace

std::string block_obstacle(const Problem& problem, const DeviceInfo& device) {
  const Fit found = fit(problem, device);
  return found.plan ? "" : found.reason;
}

void plan_block(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const Fit found = fit(problem, device);
  plan.persistent = found.plan.value();
  plan.pdl = false;
  plan.workspace_bytes = 0;
  plan.us_per_step = found.us;
  const double weights = plan.persistent->weight_bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3);
  plan.us_once = kLaunchUs + turns(*plan.persistent, device) * weights;
  plan.reason = kOnlySimulated;
}

}  // namespace fused_rnn
