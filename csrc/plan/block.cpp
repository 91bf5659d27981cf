// The planner of family `block`: whether one block holds all weights of a layer's direction. The times are those of the
// cost model (machine.h).
#include <algorithm>
#include <string>

#include "plan/block_geometry.h"
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
};

// Blocks that do not fit at once wait inside the launch. The model takes an SM to run one at a time.
int64_t turns(const PersistentPlan& plan, const DeviceInfo& device) {
  return ceil_div(int64_t{plan.groups} * plan.directions, device.sm_count);
}

// A step of one block: what the warps of a scheduler issue one after another, the products, and the latencies of one path.
double step_us(BlockShape s, const PersistentPlan& plan, const Problem& problem, const DeviceInfo& device) {
  const int warps = plan.threads / 32, chunks = cuda::block_chunks(s, problem.H), gates = gate_count(s.cell);
  const double fragments = double(warps) * chunks * cuda::block_tiles(s);
  const int columns = s.math == MathKind::kFp32 ? plan.rows : 8;  // mma.sync has 8 for 4 batch rows
  const double products =
      fragments * cuda::kWarpUnits * cuda::block_chunk_step(s.math) * columns / persistent_math_rate(s.math, device);
  const double states = double(warps) * chunks * cuda::block_chunk_words(s) * 4;
  const double smem = (states + plan.weight_bytes_in_smem) / kSmemBytesPerClock;
  const double instructions = s.backward ? kBlockBackwardInstructions + gates * kBlockBackwardGateInstructions
                                         : kBlockForwardInstructions + gates * kBlockForwardGateInstructions;
  const double clocks = (s.backward ? kBlockBackwardClocks : kBlockForwardClocks) +
                        ceil_div(warps, kSchedulers) * instructions + std::max(products, smem);
  return turns(plan, device) * clocks / (kClockGhz * 1e3);
}

Fit fit(const Problem& problem, const DeviceInfo& device) {
  if (const std::string reason = general_obstacle(problem, device, 80); !reason.empty()) return {std::nullopt, reason};
  const BlockShape shape{problem.cell, math_of(problem, device), problem.backward};
  if (problem.H % 2) return {std::nullopt, "takes even numbers of hidden units"};
  if (problem.H > cuda::max_block_units(shape)) {
    return {std::nullopt, "has up to " + std::to_string(cuda::max_block_units(shape)) + " hidden units in a block"};
  }
  const int smem = cuda::block_smem(shape, problem.H).total;
  if (smem > device.smem_per_block) {
    return {std::nullopt, "needs " + std::to_string(smem) + " bytes of shared memory beside the registers, the device has " +
                              std::to_string(device.smem_per_block)};
  }
  PersistentPlan plan{};
  const int warps = cuda::block_warps(problem.H), chunks = cuda::block_chunks(shape, problem.H);
  const int bytes = warps * cuda::block_tiles(shape) * cuda::kFragmentWords * 4;  // of a chunk
  plan.math = shape.math;
  plan.slices = plan.row_tiles = plan.launches = 1;
  plan.threads = 32 * warps;
  plan.units = warps * cuda::kWarpUnits;
  plan.rows = cuda::kBlockRows;
  plan.groups = static_cast<int>(ceil_div(problem.B, plan.rows));
  plan.directions = problem.D;
  plan.weight_bytes = chunks * bytes;
  plan.weight_bytes_in_smem = cuda::block_smem_chunks(shape, problem.H) * bytes;
  plan.weight_bytes_in_registers = plan.weight_bytes - plan.weight_bytes_in_smem;
  plan.smem_bytes = smem;
  return {plan, ""};
}

}  // namespace

std::string block_obstacle(const Problem& problem, const DeviceInfo& device) {
  const Fit found = fit(problem, device);
  return found.plan ? "" : found.reason;
}

void plan_block(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const PersistentPlan p = fit(problem, device).plan.value();
  plan.persistent = p;
  plan.pdl = false;
  plan.workspace_bytes = 0;
  plan.us_per_step = step_us({problem.cell, p.math, problem.backward}, p, problem, device);
  plan.us_once = kLaunchUs + turns(p, device) * p.weight_bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3);
  plan.reason = kOnlySimulated;
}

}  // namespace fused_rnn
