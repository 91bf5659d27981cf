#include "plan/formula_persistent.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "core/ceil_div.h"
#include "plan/machine.h"
#include "plan/persistent_geometry.h"

namespace fused_rnn {

using cuda::FormulaPersistentShape;
using cuda::MathKind;

namespace {

constexpr int kRows = cuda::kFormulaPersistentRows, kAtom = cuda::kFormulaPersistentAtom;
constexpr int kWarps = cuda::kFormulaPersistentThreads / 32;
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
    if (problem.H > (int64_t{1} << 20)) throw std::invalid_argument("more units than its blocks can hold");
    shape_.groups = cell_.phases > 0 ? 1 : problem.heads;
    shape_.heads = problem.heads / shape_.groups;
    shape_.head = static_cast<int>(ceil_div(units, padding) * padding);
    shape_.units = shape_.heads * shape_.head;
    levels_ = level_count(problem.backward ? cell_.backward_levels : cell_.forward_levels, cell_.phases);
  }

  int atoms() const { return shape_.units / kAtom; }

  // With blocks of so many atoms, whose products are split into at most so many parts.
  FormulaPersistentShape of(int atoms_of_block, int most_splits) const {
    FormulaPersistentShape s = shape_;
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
  FormulaPersistentShape fitting(int atoms_of_block, const DeviceInfo& device) const {
    for (int most_splits = kMostSplits; most_splits > 1; most_splits /= 2) {
      const FormulaPersistentShape shape = of(atoms_of_block, most_splits);
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
  void lay_out_exchanges(FormulaPersistentShape& s, int recurrent_vectors) const {
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
  int64_t sums_and_splits(FormulaPersistentShape& s, int most_splits) const {
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
  FormulaPersistentShape shape_{};
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
double exchanged_bytes(const FormulaStepProblem& problem, MathKind math, const FormulaPersistentShape& s, int levels) {
  const FormulaTraits& cell = *problem.cell;
  double vectors = 0, norms = 0;
  if (cell.recurrent_gates > 0 && !s.recurrent_local) vectors += problem.backward ? cell.recurrent_gates : 1;
  for (int level = 0; level < levels; ++level) {
    const Level found = level_of(cell, problem.backward, level);
    vectors += found.products, norms += found.norms;
  }
  return vectors * s.units * kRows * cuda::storage_bytes(math) + norms * s.ranks * kRows * 4 * cuda::accumulator_bytes(math);
}

double step_us(const FormulaStepProblem& problem, const DeviceInfo& device, const FormulaPersistentPlan& plan, int levels) {
  const FormulaPersistentShape& s = plan.shape;
  const MathKind math = plan.math;
  const FormulaTraits& cell = *problem.cell;
  const int of_block = s.slice / kAtom, chunk = cuda::chunk_size(math), gates = cell.recurrent_gates;
  const bool backward = problem.backward;
  double us = kStepUs + levels * kFormulaPassUs;
  us += (levels + 1) * kFormulaElementUs * double(ceil_div(s.slice * kRows, cuda::kFormulaPersistentThreads) - 1);
  if (s.ranks > 1) {
    // In `grid` every word has a tag.
    const bool grid = plan.family == Family::kGrid;
    const double clocks = grid ? 2 / kSharedL2BytesPerClock : 1 / kFormulaClusterBytesPerClock;
    us += s.exchanges * ((grid ? kL2HandOffUs : kClusterHandOffUs) + kFormulaGatherUs) +
          exchanged_bytes(problem, math, s, levels) * clocks / (kClockGhz * 1e3);
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

// Blocks of a team at most, and the reason where the family cannot serve at all.
int most_blocks(const FormulaStepProblem& problem, const DeviceInfo& device, Family family, int exchanges) {
  if (family == Family::kCluster) {
    return device.compiled_for < kFormulaClusterCapability ? 1 : std::min(device.max_cluster, cuda::kMaxClusterBlocks);
  }
  if (device.compiled_for < kFormulaGridCapability) {
    throw std::invalid_argument("needs compute capability " + capability_text(kFormulaGridCapability));
  }
  if (problem.T > (int64_t{1} << 31) / (exchanges + 1)) throw std::invalid_argument("numbers all exchanges with 32 bits");
  const int resident = device.resident_blocks == 0 ? device.sm_count : device.resident_blocks;
  if (resident < 1) throw std::invalid_argument("the device runs no block of its kernels");
  return resident;
}

// Teams of so many blocks that run at once.
int64_t teams_at_once(const DeviceInfo& device, Family family, int blocks) {
  if (family == Family::kGrid) return (device.resident_blocks == 0 ? device.sm_count : device.resident_blocks) / blocks;
  return blocks == 1 ? device.sm_count : clusters_at_once(device, blocks);
}

}  // namespace

FormulaPersistentPlan plan_formula_persistent(const FormulaStepProblem& problem, const DeviceInfo& device, Family family,
                                              int ranks) {
  const MathKind math = cuda::math_kind(problem.dtype, /*allow_tf32=*/false);
  const Layout layout(problem, math);
  const int most = most_blocks(problem, device, family, layout.levels() + 1);
  const int64_t row_tiles = ceil_div(problem.B, int64_t{kRows});
  FormulaPersistentPlan best{};
  int64_t least_bytes = 0;
  for (int blocks = 1; blocks <= std::min(std::max(most, 1), layout.atoms()); ++blocks) {
    FormulaPersistentPlan plan{};
    plan.family = family, plan.math = math;
    plan.shape = layout.fitting(static_cast<int>(ceil_div(layout.atoms(), blocks)), device);
    if (plan.shape.ranks != blocks || (ranks > 0 && ranks != blocks)) continue;
    least_bytes = least_bytes ? std::min<int64_t>(least_bytes, plan.shape.smem_bytes) : plan.shape.smem_bytes;
    if (plan.shape.smem_bytes > device.smem_per_block) continue;
    plan.teams = row_tiles * plan.shape.groups * problem.D;
    plan.at_once = teams_at_once(device, family, blocks);
    if (plan.at_once == 0) continue;
    const double turns = double(ceil_div(std::max<int64_t>(plan.teams, 1), plan.at_once));
    plan.us_per_step = turns * step_us(problem, device, plan, layout.levels());
    plan.us_once = turns * plan.shape.smem_bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3) + 2 * kL2LatencyUs;
    const double us = plan.us_once + double(problem.T) * plan.us_per_step;
    if (best.shape.ranks == 0 || us < best.us_once + double(problem.T) * best.us_per_step) best = plan;
  }
  if (best.shape.ranks == 0) {
    std::string reason = least_bytes == 0
                             ? "no team of so many blocks has work for all of them"
                             : "weights and states of a block need at least " + std::to_string(least_bytes) +
                                   " bytes of shared memory, and a block has " + std::to_string(device.smem_per_block);
    if (most <= 1 && ranks == 0) reason += "; the device or the code for it has no clusters, among which to divide them";
    throw std::invalid_argument(reason);
  }
  const bool exchanges = family == Family::kGrid && best.shape.ranks > 1 && best.shape.exchanges > 0;
  best.row_tiles = static_cast<int>(row_tiles);
  // Clusters that do not run at once wait inside of one launch.
  best.launches = exchanges ? static_cast<int>(ceil_div(std::max<int64_t>(best.teams, 1), best.at_once)) : 1;
  best.exchange_bytes = exchanges ? best.teams * 2 * formula_exchange_bytes(best.shape) : 0;
  best.us_once += (best.launches + exchanges) * kLaunchUs;
  if (best.teams * best.shape.ranks > 0x7fffffff) throw std::invalid_argument("the launch exceeds what CUDA can launch");
  return best;
}

std::string to_string(const FormulaPersistentPlan& plan) {
  const FormulaPersistentShape& s = plan.shape;
  const std::string launches = plan.launches == 1 ? "1 launch" : std::to_string(plan.launches) + " launches";
  char text[320];
  std::snprintf(text, sizeof text,
                "%s for all steps, about %.1f us a step and %.1f us once (model, not measured), %s arithmetic; %lld "
                "%s%s of %d block%s of %d threads, %lld at once, %d units of a block, %d exchanges a step, %d bytes of "
                "shared memory",
                launches.c_str(), plan.us_per_step, plan.us_once, cuda::to_string(plan.math),
                static_cast<long long>(plan.teams), plan.family == Family::kGrid ? "team" : "cluster",
                plan.teams == 1 ? "" : "s", s.ranks, s.ranks == 1 ? "" : "s", cuda::kFormulaPersistentThreads,
                static_cast<long long>(plan.at_once), s.slice, s.ranks > 1 ? s.exchanges : 0, s.smem_bytes);
  return text;
}

}  // namespace fused_rnn
