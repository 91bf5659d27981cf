#include "plan/formula_cluster.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "core/ceil_div.h"
#include "plan/machine.h"
#include "plan/persistent_geometry.h"

namespace fused_rnn {

using cuda::FormulaClusterShape;
using cuda::MathKind;

namespace {

constexpr int kRows = cuda::kFormulaClusterRows, kAtom = cuda::kFormulaClusterAtom;
constexpr int kWarps = cuda::kFormulaClusterThreads / 32;
constexpr int kMostSplits = 8;

// The phases of a level: products and norms.
struct Level {
  int products, norms;
};
Level level_of(const FormulaTraits& cell, bool backward, int level) {
  const int* const levels = backward ? cell.backward_levels : cell.forward_levels;
  Level result{};
  for (int k = 0; k < cell.phases; ++k) {
    if (levels[k] != level) continue;
    const bool product = static_cast<FormulaPhase>(cell.phase_kinds[k]) == FormulaPhase::kProduct;
    ++(product ? result.products : result.norms);
  }
  return result;
}

class Layout {
 public:
  Layout(const FormulaStepProblem& problem, MathKind math)
      : problem_(problem), cell_(*problem.cell), math_(math), chunk_(cuda::chunk_size(math)) {
    const int64_t units = problem.H / problem.heads, padding = std::max(chunk_, kAtom);
    if (problem.H > (int64_t{1} << 20)) throw std::invalid_argument("more units than a cluster can hold");
    shape_.groups = cell_.phases > 0 ? 1 : problem.heads;
    shape_.heads = problem.heads / shape_.groups;
    shape_.head = static_cast<int>(ceil_div(units, padding) * padding);
    shape_.units = shape_.heads * shape_.head;
    levels_ = level_count(problem.backward ? cell_.backward_levels : cell_.forward_levels, cell_.phases);
  }

  int atoms() const { return shape_.units / kAtom; }

  // With blocks of so many atoms, whose products are split into at most so many parts.
  FormulaClusterShape of(int atoms_of_block, int most_splits) const {
    FormulaClusterShape s = shape_;
    const bool backward = problem_.backward, recurs = cell_.recurrent_gates > 0;
    const int size = cuda::storage_bytes(math_), wide = cuda::accumulator_bytes(math_);
    s.slice = atoms_of_block * kAtom;
    s.ranks = ceil_div(atoms(), atoms_of_block);
    s.recurrent_local = recurs && (s.slice % s.head == 0 || s.ranks == 1);
    s.exchanges = levels_ + (recurs && !s.recurrent_local);
    const int elements = s.slice * kRows, vector = s.units * kRows * size, states = cell_.states, phases = cell_.phases;
    int64_t offset = 0;
    const auto take = [&offset](int64_t bytes) {
      const int64_t at = offset;
      offset += ceil_div(bytes, int64_t{128}) * 128;
      return static_cast<int>(std::min<int64_t>(at, 1 << 30));
    };
    s.barriers = take(2 * 8);
    s.table = take(4 * kRows * int64_t{sizeof(cuda::RowInfo)});
    s.constants = take(int64_t{size} * s.slice * (cell_.recurrent_gates + cell_.parameters + 2 * phases));
    s.staged = take(int64_t{size} * elements * (backward ? cell_.saved + 2 * states + 1 + phases : cell_.input_gates));
    s.arrays = take(int64_t{wide} * elements * (states + arrays_of_phases()));
    s.moments = take(int64_t{4} * wide * kRows * phases);
    s.sums = take(sums_and_splits(s, most_splits) * wide);
    const int64_t head_rows = int64_t{s.slice} * s.head * size;
    s.weights[0] = take(recurs ? cell_.recurrent_gates * head_rows : 0);
    for (int k = 0; k < phases; ++k) {
      const bool product = static_cast<FormulaPhase>(cell_.phase_kinds[k]) == FormulaPhase::kProduct;
      s.weights[k + 1] = take(product ? int64_t{s.slice} * s.units * size : 0);
    }
    const int recurrent_vectors = !recurs ? 0 : backward ? cell_.recurrent_gates : 1;
    s.own_vector = take(s.recurrent_local ? int64_t{vector} * recurrent_vectors : 0);
    lay_out_exchanges(s, recurrent_vectors);
    s.vectors = take(s.vectors_bytes);
    s.norms = take(s.norms_bytes);
    s.smem_bytes = static_cast<int>(std::min<int64_t>(offset, 1 << 30));
    return s;
  }

  int levels() const { return levels_; }

  // With as many parts as there is room for.
  FormulaClusterShape fitting(int atoms_of_block, const DeviceInfo& device) const {
    for (int most_splits = kMostSplits; most_splits > 1; most_splits /= 2) {
      const FormulaClusterShape shape = of(atoms_of_block, most_splits);
      if (shape.smem_bytes <= device.smem_per_block) return shape;
    }
    return of(atoms_of_block, 1);
  }

 private:
  // Accumulators, what norms took (backward: the gradients of what they gave), and results (backward: gradients of what was
  // taken) of phases before the last level.
  int arrays_of_phases() const {
    const int* const levels = problem_.backward ? cell_.backward_levels : cell_.forward_levels;
    int count = cell_.phases > 0 && !problem_.backward ? cell_.gradients : 0;
    for (int k = 0; k < cell_.phases; ++k) {
      count += static_cast<FormulaPhase>(cell_.phase_kinds[k]) != FormulaPhase::kProduct;
      count += levels[k] + 1 < levels_;
    }
    return count;
  }
  // Exchanges that follow each other, also from a step to the next, do not overlap.
  void lay_out_exchanges(FormulaClusterShape& s, int recurrent_vectors) const {
    const int64_t vector = int64_t{s.units} * kRows * cuda::storage_bytes(math_);
    const int64_t norm = int64_t{s.ranks} * kRows * 4 * cuda::accumulator_bytes(math_);
    Level exchanges[kMostFormulaPhases + 1], most{};
    int count = 0;
    if (cell_.recurrent_gates > 0 && !s.recurrent_local) exchanges[count++] = {recurrent_vectors, 0};
    for (int level = 0; level < levels_; ++level) exchanges[count++] = level_of(cell_, problem_.backward, level);
    for (int i = 0; i < count; ++i) {
      const Level &one = exchanges[i], &next = exchanges[(i + 1) % count];
      most.products = std::max(most.products, one.products + next.products);
      most.norms = std::max(most.norms, one.norms + next.norms);
    }
    s.vectors_bytes = static_cast<int>(std::min<int64_t>(most.products * vector, 1 << 30));
    s.norms_bytes = static_cast<int>(std::min<int64_t>(most.norms * norm, 1 << 30));
  }

  // Numbers that the parts of sums take; fills in the splits.
  int64_t sums_and_splits(FormulaClusterShape& s, int most_splits) const {
    const int of_block = s.slice / kAtom, head_chunks = s.head / chunk_;
    int64_t most = 0;
    const auto choose = [&](int tasks, int chunks) {
      int best = 1;
      double least = 0;
      for (int splits = 1; splits <= std::min(most_splits, chunks); ++splits) {
        const double time = double(ceil_div(tasks * splits, kWarps)) * ceil_div(chunks, splits) + 0.25 * splits;
        if (splits == 1 || time < least) best = splits, least = time;
      }
      most = std::max(most, int64_t{tasks} * best * kAtom * kRows);
      return best;
    };
    const int gates = cell_.recurrent_gates;
    for (int& splits : s.splits) splits = 1;
    if (gates > 0) {
      s.splits[0] = choose((problem_.backward ? 1 : gates) * of_block, (problem_.backward ? gates : 1) * head_chunks);
    }
    for (int level = 0; level < levels_; ++level) {
      const int products = level_of(cell_, problem_.backward, level).products;
      if (products > 0) s.splits[level + 1] = choose(products * of_block, s.units / chunk_);
    }
    return most;
  }

  const FormulaStepProblem& problem_;
  const FormulaTraits& cell_;
  MathKind math_;
  int chunk_, levels_;
  FormulaClusterShape shape_{};
};

// A product of a block in a step.
double product_us(int tasks, int splits, int chunks, MathKind math, const DeviceInfo& device) {
  const double bytes = double(tasks) * chunks * (kAtom + kRows) * cuda::kChunkBytes;
  const double adds = double(tasks) * chunks * kAtom * kRows * cuda::chunk_size(math);
  const bool tensor = cuda::traits_of(math).tensor_cores && (math != MathKind::kBf16 || device.compiled_for >= 80);
  const double alone =
      ceil_div(tasks * splits, kWarps) * ceil_div(chunks, splits) * (tensor ? kFormulaTensorClocks : kFormulaPlainClocks);
  return std::max({bytes / kSmemBytesPerClock, adds / persistent_math_rate(math, device), alone}) / (kClockGhz * 1e3);
}

// What reaches a block in a step.
double exchanged_bytes(const FormulaStepProblem& problem, MathKind math, const FormulaClusterShape& s, int levels) {
  const FormulaTraits& cell = *problem.cell;
  double vectors = 0, norms = 0;
  if (cell.recurrent_gates > 0 && !s.recurrent_local) vectors += problem.backward ? cell.recurrent_gates : 1;
  for (int level = 0; level < levels; ++level) {
    const Level found = level_of(cell, problem.backward, level);
    vectors += found.products, norms += found.norms;
  }
  return vectors * s.units * kRows * cuda::storage_bytes(math) + norms * s.ranks * kRows * 4 * cuda::accumulator_bytes(math);
}

double step_us(const FormulaStepProblem& problem, const DeviceInfo& device, MathKind math, const FormulaClusterShape& s,
               int levels) {
  const FormulaTraits& cell = *problem.cell;
  const int of_block = s.slice / kAtom, chunk = cuda::chunk_size(math), gates = cell.recurrent_gates;
  const bool backward = problem.backward;
  double us = kStepUs + levels * kFormulaPassUs;
  us += (levels + 1) * kFormulaElementUs * double(ceil_div(s.slice * kRows, cuda::kFormulaClusterThreads) - 1);
  if (s.ranks > 1) {
    us += s.exchanges * (kClusterHandOffUs + kFormulaGatherUs) +
          exchanged_bytes(problem, math, s, levels) / kFormulaClusterBytesPerClock / (kClockGhz * 1e3);
  }
  if (gates > 0) {
    us += product_us((backward ? 1 : gates) * of_block, s.splits[0], (backward ? gates : 1) * s.head / chunk, math, device);
  }
  for (int level = 0; level < levels; ++level) {
    const Level found = level_of(cell, backward, level);
    if (found.products > 0) us += product_us(found.products * of_block, s.splits[level + 1], s.units / chunk, math, device);
    us += found.norms * kFormulaNormUs * (backward ? 2 : 1);
  }
  return us;
}

}  // namespace

FormulaClusterPlan plan_formula_cluster(const FormulaStepProblem& problem, const DeviceInfo& device, int ranks) {
  FormulaClusterPlan plan{};
  plan.math = cuda::math_kind(problem.dtype, /*allow_tf32=*/false);
  plan.row_tiles = ceil_div(problem.B, int64_t{kRows});
  const Layout layout(problem, plan.math);
  const bool clusters = device.compiled_for >= 90;
  const int most = clusters ? static_cast<int>(std::min<int64_t>(device.max_cluster, cuda::kMaxClusterBlocks)) : 1;
  double least = 0;
  int64_t least_bytes = 0;
  for (int blocks = 1; blocks <= std::min(std::max(most, 1), layout.atoms()); ++blocks) {
    const FormulaClusterShape shape = layout.fitting(static_cast<int>(ceil_div(layout.atoms(), blocks)), device);
    if (shape.ranks != blocks || (ranks > 0 && ranks != blocks)) continue;
    least_bytes = least_bytes ? std::min<int64_t>(least_bytes, shape.smem_bytes) : shape.smem_bytes;
    if (shape.smem_bytes > device.smem_per_block) continue;
    const int64_t at_once = blocks == 1 ? device.sm_count : clusters_at_once(device, blocks);
    if (at_once == 0) continue;
    const int64_t needed = plan.row_tiles * shape.groups * problem.D;
    const double us = double(ceil_div(std::max<int64_t>(needed, 1), at_once)) *
                      step_us(problem, device, plan.math, shape, layout.levels());
    if (plan.shape.ranks > 0 && us >= least) continue;
    least = us;
    plan.shape = shape;
    plan.clusters = needed, plan.at_once = at_once;
  }
  if (plan.shape.ranks == 0) {
    std::string reason = least_bytes == 0
                             ? "no cluster of that size has work for all of its blocks"
                             : "weights and states of a block need at least " + std::to_string(least_bytes) +
                                   " bytes of shared memory, and a block has " + std::to_string(device.smem_per_block);
    if (most <= 1 && ranks == 0) reason += "; the device or the code for it has no clusters, among which to divide them";
    throw std::invalid_argument(reason);
  }
  if (plan.row_tiles * plan.shape.ranks > 0x7fffffff || plan.shape.groups > 0xffff) {
    throw std::invalid_argument("the grid exceeds what CUDA can launch");
  }
  plan.us_per_step = least;
  const double bytes = double(plan.shape.smem_bytes) * double(ceil_div(std::max<int64_t>(plan.clusters, 1), plan.at_once));
  plan.us_once = kLaunchUs + 2 * kL2LatencyUs + bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3);
  return plan;
}

std::string to_string(const FormulaClusterPlan& plan) {
  const FormulaClusterShape& s = plan.shape;
  char text[320];
  std::snprintf(text, sizeof text,
                "1 launch for all steps, about %.1f us a step and %.1f us once (model, not measured), %s arithmetic; %lld "
                "cluster%s of %d block%s of %d threads, %lld at once, %d units of a block, %d exchanges a step, %d bytes of "
                "shared memory",
                plan.us_per_step, plan.us_once, cuda::to_string(plan.math), static_cast<long long>(plan.clusters),
                plan.clusters == 1 ? "" : "s", s.ranks, s.ranks == 1 ? "" : "s", cuda::kFormulaClusterThreads,
                static_cast<long long>(plan.at_once), s.slice, s.ranks > 1 ? s.exchanges : 0, s.smem_bytes);
  return text;
}

}  // namespace fused_rnn
