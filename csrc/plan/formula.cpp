#include "plan/formula.h"

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

bool is_product(const FormulaTraits& cell, int phase) {
  return static_cast<FormulaPhase>(cell.phase_kinds[phase]) == FormulaPhase::kProduct;
}

// What a segment makes before its pointwise part: products, each of `groups` blocks of weight rows and K columns, and norms,
// which read their rows `reads` times, one after the other (formula_norm.cuh).
struct Work {
  int groups;
  int64_t K;
  int products, reads;
  int slots;        // accumulators of a unit
  int64_t input_K;  // columns of the input product that is added; 0: none

  int64_t columns() const { return K + input_K; }
  int64_t chunks(MathKind math) const {
    const int64_t chunk = cuda::chunk_size(math);
    return ceil_div(K, chunk) + ceil_div(input_K, chunk);
  }
};
int reads_of_norm(const FormulaTraits& cell, int phase, bool backward) {
  return (static_cast<FormulaPhase>(cell.phase_kinds[phase]) == FormulaPhase::kLayerNorm ? 2 : 1) * (backward ? 2 : 1);
}

// A warp takes a row of a norm after the other.
double work_us(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, const Work& work,
               const TileShape& tile, const FormulaKernelPlan& plan) {
  const int64_t blocks = plan.grid_x * plan.grid_y * problem.D, k = work.columns(), chunks = work.chunks(math);
  const double weight_bytes = double(problem.D) * work.groups * double(problem.H * k) * cuda::storage_bytes(math);
  const double product = product_us({math, tile, work.groups, k, chunks, blocks, plan.stages, weight_bytes}, device);
  const int64_t rows_of_warp = ceil_div(tile.batch, cuda::tile_threads(tile) / 32);
  return work.products * product + double(work.reads * rows_of_warp) * kL2LatencyUs;
}

// The kernel of a segment with one tile; stages is 0 where it does not fit.
FormulaKernelPlan kernel_of(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, const Work& work,
                            TileSize size) {
  const KernelRole role = problem.backward   ? KernelRole::kBackward
                          : work.input_K > 0 ? KernelRole::kForwardInput
                                             : KernelRole::kForward;
  const TileShape tile = cuda::tile_shape(role, math, size);
  const int groups = std::max(work.groups, 1), slots = std::max(work.slots, 1);  // also for the moments of a norm
  const auto bytes = [&](int stages) { return cuda::smem_bytes(role, groups, slots, math, tile, stages); };
  FormulaKernelPlan plan{};
  plan.tile = size;
  plan.grid_x = ceil_div(problem.B, tile.batch);
  plan.grid_y = problem.heads * ceil_div(problem.H / problem.heads, tile.units);
  plan.threads = cuda::tile_threads(tile);
  plan.stages = choose_stages(device, tile, work.chunks(math), bytes);
  plan.smem_bytes = bytes(plan.stages);
  plan.us = step_launch_us(device) + work_us(problem, device, math, work, tile, plan);
  return plan;
}

// The small tile where its blocks run all at once, so that the step is over the sooner; else the medium one, which reads the
// weights for four times as many rows. Without a product there is a kernel of the small tile alone.
FormulaKernelPlan plan_kernel(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, const Work& work) {
  const FormulaKernelPlan small = kernel_of(problem, device, math, work, TileSize::kSmall);
  FormulaKernelPlan medium{};
  const bool has_medium = work.products > 0 && (work.input_K == 0 || work.slots <= kMostMediumSlots);
  if (has_medium) medium = kernel_of(problem, device, math, work, TileSize::kMedium);
  const bool at_once = !has_medium || small.grid_x == 1 || small.grid_x * small.grid_y * problem.D <= device.sm_count;
  const FormulaKernelPlan& chosen = small.stages && (at_once || !medium.stages) ? small : medium;
  if (chosen.stages == 0) {
    throw std::invalid_argument("a product of " + std::to_string(work.groups) +
                                " gates needs more shared memory than a block has");
  }
  if (chosen.grid_x > 0x7fffffff || chosen.grid_y > 0xffff) {
    throw std::invalid_argument("the grid exceeds what CUDA can launch");
  }
  return chosen;
}

FormulaWorkspace lay_out(const FormulaStepProblem& problem, MathKind math) {
  const FormulaTraits& cell = *problem.cell;
  FormulaWorkspace layout{};
  const auto take = [&](bool there, int64_t arrays, int element_bytes) {
    const int64_t at = there ? layout.bytes : -1;
    if (there) layout.bytes += ceil_div(arrays * problem.D * problem.B * problem.H * element_bytes, 256) * 256;
    return at;
  };
  const int wide = cuda::accumulator_bytes(math), stored = cuda::storage_bytes(math);
  const bool recurs = cell.recurrent_gates > 0, phases = cell.phases > 0;
  for (int i = 0; i < kMostFormulaStates; ++i) {
    const bool in_other_place = i == cell.output || (recurs && i == cell.recurrent);
    layout.states[i] = take(i < cell.states && (problem.backward || !in_other_place), 1, wide);
  }
  const int64_t rec_columns = problem.backward ? cell.recurrent_gates : 1;
  const bool two_copies = recurs && (problem.backward ? problem.heads > 1 : cell.recurrent != cell.output);
  layout.recurrent = take(two_copies, 2 * rec_columns, stored);
  layout.rec = take(recurs && phases, problem.backward ? 1 : cell.recurrent_gates, wide);
  for (int k = 0; k < kMostFormulaPhases; ++k) {
    const bool product = k < cell.phases && is_product(cell, k);
    layout.taken[k] = take(k < cell.phases && !(problem.backward && product), 1, product ? stored : wide);
    layout.results[k] = take(k < cell.phases, 1, wide);
  }
  return layout;
}

}  // namespace

FormulaStepPlan plan_formula_step(const FormulaStepProblem& problem, const DeviceInfo& device, Family family) {
  const FormulaTraits& cell = *problem.cell;
  FormulaStepPlan plan{};
  plan.family = family;
  plan.math = cuda::math_kind(problem.dtype, /*allow_tf32=*/false);
  plan.pdl = device.compiled_for >= 90;
  const int64_t units = problem.H / problem.heads;
  const int gates = cell.recurrent_gates, recurs = gates > 0;
  Work recurrent =
      problem.backward ? Work{recurs, gates * units, recurs, 0, recurs, 0} : Work{gates, units, recurs, 0, gates, 0};
  if (family == Family::kSingle) {
    recurrent = {std::max(gates, cell.input_gates), recurs ? units : 0, 1, 0, cell.gradients, problem.I};
  }
  const int* const levels = problem.backward ? cell.backward_levels : cell.forward_levels;
  plan.segments.push_back(plan_kernel(problem, device, plan.math, recurrent));
  for (int level = 0; level < level_count(levels, cell.phases); ++level) {
    Work work{0, problem.H, 0, 0, 0, 0};
    for (int k = 0; k < cell.phases; ++k) {
      if (levels[k] != level) continue;
      if (is_product(cell, k)) {
        ++work.products;
      } else {
        work.reads += reads_of_norm(cell, k, problem.backward);
      }
    }
    work.groups = work.slots = work.products > 0;
    plan.segments.push_back(plan_kernel(problem, device, plan.math, work));
  }
  for (const FormulaKernelPlan& segment : plan.segments) plan.us_per_step += segment.us;
  if (problem.backward) plan.initial = plan_kernel(problem, device, plan.math, recurrent);
  plan.workspace = lay_out(problem, plan.math);
  return plan;
}

std::string to_string(const FormulaStepPlan& plan) {
  char text[160];
  std::snprintf(text, sizeof text, "%d launch%s a step%s, about %.1f us, %s arithmetic, %lld bytes of working memory",
                static_cast<int>(plan.segments.size()), plan.segments.size() == 1 ? "" : "es",
                plan.pdl ? " that overlap" : "", plan.us_per_step, cuda::to_string(plan.math),
                static_cast<long long>(plan.workspace.bytes));
  std::string all = text;
  for (const FormulaKernelPlan& kernel : plan.segments) {
    std::snprintf(text, sizeof text, "; %s tile, %lld x %lld blocks of %d threads, %d stages, %d bytes of shared memory",
                  cuda::to_string(kernel.tile), static_cast<long long>(kernel.grid_x), static_cast<long long>(kernel.grid_y),
                  kernel.threads, kernel.stages, kernel.smem_bytes);
    all += text;
  }
  return all;
}

}  // namespace fused_rnn
