#include "plan/formula.h"

#include <cstdio>
#include <stdexcept>

#include "core/ceil_div.h"
#include "plan/stages.h"

namespace fused_rnn {

using cuda::KernelRole;
using cuda::MathKind;
using cuda::TileShape;
using cuda::TileSize;

namespace {

bool is_product(const FormulaTraits& cell, int phase) {
  return static_cast<FormulaPhase>(cell.phase_kinds[phase]) == FormulaPhase::kProduct;
}

// The kernel of a product of `groups` blocks of weight rows and K columns with one tile; stages is 0 where it does not fit.
FormulaKernelPlan kernel_of(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, int groups,
                            int64_t K, TileSize size) {
  const KernelRole role = problem.backward ? KernelRole::kBackward : KernelRole::kForward;
  const TileShape tile = cuda::tile_shape(role, math, size);
  const int slots = groups > 0 ? groups : 1;  // room for the moments of a norm
  const auto bytes = [&](int stages) { return cuda::smem_bytes(role, slots, slots, math, tile, stages); };
  FormulaKernelPlan plan{};
  plan.tile = size;
  plan.grid_x = ceil_div(problem.B, tile.batch);
  plan.grid_y = problem.heads * ceil_div(problem.H / problem.heads, tile.units);
  plan.threads = cuda::tile_threads(tile);
  plan.stages = choose_stages(device, tile, ceil_div(K, cuda::chunk_size(math)), bytes);
  plan.smem_bytes = bytes(plan.stages);
  return plan;
}

// The small tile where its blocks run all at once, so that the step is over the sooner; else the medium one, which reads the
// weights for four times as many rows. groups 0: there is no product, and a kernel of the small tile alone.
FormulaKernelPlan plan_kernel(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, int groups,
                              int64_t K) {
  const FormulaKernelPlan small = kernel_of(problem, device, math, groups, K, TileSize::kSmall);
  FormulaKernelPlan medium{};
  if (groups > 0) medium = kernel_of(problem, device, math, groups, K, TileSize::kMedium);
  const bool at_once = groups == 0 || small.grid_x == 1 || small.grid_x * small.grid_y * problem.D <= device.sm_count;
  const FormulaKernelPlan& chosen = small.stages && (at_once || !medium.stages) ? small : medium;
  if (chosen.stages == 0) {
    throw std::invalid_argument("a product of " + std::to_string(groups) +
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

FormulaStepPlan plan_formula_step(const FormulaStepProblem& problem, const DeviceInfo& device) {
  const FormulaTraits& cell = *problem.cell;
  FormulaStepPlan plan{};
  plan.math = cuda::math_kind(problem.dtype, /*allow_tf32=*/false);
  plan.pdl = device.compiled_for >= 90;
  const int64_t units = problem.H / problem.heads;
  const int gates = cell.recurrent_gates, product_of_gates = gates > 0;
  for (int segment = 0; segment <= cell.phases; ++segment) {
    const bool recurrent = segment == (problem.backward ? cell.phases : 0);
    const int phase = problem.backward ? segment : segment - 1;
    const int groups = !recurrent ? is_product(cell, phase) : problem.backward ? product_of_gates : gates;
    const int64_t K = !recurrent ? problem.H : problem.backward ? gates * units : units;
    plan.segments.push_back(plan_kernel(problem, device, plan.math, groups, K));
  }
  if (problem.backward) plan.initial = plan_kernel(problem, device, plan.math, product_of_gates, gates * units);
  plan.workspace = lay_out(problem, plan.math);
  return plan;
}

std::string to_string(const FormulaStepPlan& plan) {
  char text[160];
  std::snprintf(text, sizeof text, "%d launch%s a step%s, %s arithmetic, %lld bytes of working memory",
                static_cast<int>(plan.segments.size()), plan.segments.size() == 1 ? "" : "es",
                plan.pdl ? " that overlap" : "", cuda::to_string(plan.math), static_cast<long long>(plan.workspace.bytes));
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
