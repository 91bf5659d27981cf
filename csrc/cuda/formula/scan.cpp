#include "cuda/formula/scan.h"

#include <algorithm>
#include <initializer_list>

#include "cuda/copy_width.h"

namespace fused_rnn::cuda {
namespace {

void* at(void* workspace, int64_t offset) { return offset < 0 ? nullptr : static_cast<unsigned char*>(workspace) + offset; }

FormulaLaunch launch_of(const FormulaKernelPlan& plan, FormulaRole role, int segment, int D) {
  FormulaLaunch launch{};
  launch.role = role;
  launch.segment = segment;
  launch.tile = plan.tile;
  launch.grid_x = static_cast<int>(plan.grid_x), launch.grid_y = static_cast<int>(plan.grid_y), launch.grid_z = D;
  launch.threads = plan.threads, launch.smem_bytes = plan.smem_bytes;
  return launch;
}
// Bytes that may be copied at once between rows of a segment's operands: those of the recurrent product, or a phase's.
// rows: where the rows of the states begin; distances: the bitwise or of bytes between them that no size says.
int width_of(const FormulaLayer& p, const FormulaStepPlan& plan, int phase, std::initializer_list<const void*> rows,
             int64_t distances = 0) {
  const int bytes = storage_bytes(plan.math);
  const FormulaDirection &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  const int64_t units = phase < 0 ? p.H / p.heads : p.H | p.H / p.heads;
  const auto* const matrix0 = phase < 0 ? w0.w_hh : w0.weight[phase];
  const auto* const matrix1 = phase < 0 ? w1.w_hh : w1.weight[phase];
  const int of_weights = copy_width({matrix0, matrix1}, units * bytes, bytes);
  const int of_rows = copy_width(rows, units * bytes | distances, bytes);
  return of_weights < of_rows ? of_weights : of_rows;
}

// The same of the phases of a level. rows(k): where the rows of phase k's product begin.
template <class Rows>
int width_of_level(const FormulaLayer& p, const FormulaTraits& cell, const FormulaStepPlan& plan, const int* levels,
                   int level, const Rows& rows) {
  int width = 16;
  for (int k = 0; k < cell.phases; ++k) {
    if (levels[k] != level || static_cast<FormulaPhase>(cell.phase_kinds[k]) != FormulaPhase::kProduct) continue;
    const int of_phase = width_of(p, plan, k, {rows(k)});
    width = of_phase < width ? of_phase : width;
  }
  return width;
}

// The segments of a step in their order, each with its arguments.
template <class Step>
struct Segment {
  FormulaLaunch launch;
  int stages, copy_bytes;
};
template <class Step>
void run(Segment<Step>& segment, Step& step, bool pdl, const FormulaLauncher& launch) {
  segment.launch.pdl = pdl;
  step.stages = segment.stages;
  step.copy_bytes = segment.copy_bytes;
  launch(segment.launch, &step, sizeof step);
}

}  // namespace

void run_formula_forward(const FormulaForward& p, const FormulaTraits& cell, const FormulaStepPlan& plan, void* workspace,
                         const FormulaLauncher& launch) {
  FormulaForwardStep step{p, 0, 0, 0, 0};
  const FormulaWorkspace& layout = plan.workspace;
  for (int i = 0; i < kMostFormulaStates; ++i) step.p.states[i] = at(workspace, layout.states[i]);
  step.p.recurrent = at(workspace, layout.recurrent);
  step.p.rec = at(workspace, layout.rec);
  for (int k = 0; k < kMostFormulaPhases; ++k) {
    step.p.taken[k] = at(workspace, layout.taken[k]);
    step.p.results[k] = at(workspace, layout.results[k]);
  }
  std::vector<Segment<FormulaForwardStep>> segments;
  const void* const state = step.p.recurrent ? step.p.recurrent : p.y;
  const ResetState& put = p.reset_states[cell.recurrent];
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const int segment = static_cast<int>(i);
    const int width =
        i == 0 ? width_of(p, plan, -1, {state, p.initial[cell.recurrent], put.data}, put.step | put.direction | put.row)
               : width_of_level(p, cell, plan, cell.forward_levels, segment - 1, [&](int k) { return step.p.taken[k]; });
    const bool single = plan.family == Family::kSingle && i == 0;
    const FormulaRole role = single ? FormulaRole::kSingleForward : FormulaRole::kForward;
    segments.push_back({launch_of(plan.segments[i], role, segment, p.D), plan.segments[i].stages, width});
  }
  const int bytes = storage_bytes(plan.math);
  step.input_copy_bytes = copy_width({p.input, p.weights[0].w_ih, p.weights[p.D - 1].w_ih}, p.I * bytes, bytes);
  for (step.step = 0; step.step < p.seq.T; ++step.step) {
    // The first launch waits for all earlier work of the stream. Later ones may read weights early.
    for (size_t k = 0; k < segments.size(); ++k) run(segments[k], step, plan.pdl && (step.step > 0 || k > 0), launch);
  }
}

void run_formula_backward(const FormulaBackward& p, const FormulaTraits& cell, const FormulaStepPlan& plan, void* workspace,
                          const FormulaLauncher& launch) {
  FormulaBackwardStep step{p, 0, 0, 0};
  const FormulaWorkspace& layout = plan.workspace;
  for (int i = 0; i < kMostFormulaStates; ++i) step.p.d_states[i] = at(workspace, layout.states[i]);
  step.p.d_rec = at(workspace, layout.recurrent);
  step.p.rec = at(workspace, layout.rec);
  for (int k = 0; k < kMostFormulaPhases; ++k) {
    step.p.d_results[k] = at(workspace, layout.taken[k]);
    step.p.d_taken[k] = at(workspace, layout.results[k]);
  }
  const int recurrent_width = width_of(p, plan, -1, {step.p.d_rec ? step.p.d_rec : p.d});
  std::vector<Segment<FormulaBackwardStep>> segments;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const int segment = static_cast<int>(i);
    const int width = i == 0 ? recurrent_width
                             : width_of_level(p, cell, plan, cell.backward_levels, segment - 1, [&](int) { return p.d; });
    segments.push_back({launch_of(plan.segments[i], FormulaRole::kBackward, segment, p.D), plan.segments[i].stages, width});
  }
  bool first = true;
  for (step.step = p.seq.T - 1; step.step >= 0; --step.step) {
    for (auto& segment : segments) {
      run(segment, step, plan.pdl && !first, launch);
      first = false;
    }
  }
  bool asked = false;
  for (int i = 0; i < cell.states; ++i) asked |= p.d_initial[i] != nullptr;
  if (!asked) return;
  step.step = -1;
  Segment<FormulaBackwardStep> initial{launch_of(plan.initial, FormulaRole::kInitialGradients, 0, p.D), plan.initial.stages,
                                       recurrent_width};
  run(initial, step, plan.pdl && !first, launch);
}

namespace {

// The plan's shape, and whether rows of all weights can be copied by 16 bytes.
FormulaPersistentShape shape_of(const FormulaLayer& p, const FormulaTraits& cell, const FormulaPersistentPlan& plan) {
  FormulaPersistentShape shape = plan.shape;
  const int bytes = storage_bytes(plan.math);
  int width = 16;
  for (int d = 0; d < p.D; ++d) {
    width = std::min(width, copy_width({p.weights[d].w_hh}, p.H / p.heads * bytes, bytes));
    for (int k = 0; k < cell.phases; ++k) {
      if (static_cast<FormulaPhase>(cell.phase_kinds[k]) != FormulaPhase::kProduct) continue;
      width = std::min(width, copy_width({p.weights[d].weight[k]}, p.H / p.heads * bytes, bytes));
    }
  }
  shape.copy_vectors = width == 16;
  return shape;
}

// arguments: FormulaPersistentForward or FormulaPersistentBackward.
template <class Arguments>
void launch_teams(Arguments arguments, const FormulaPersistentPlan& plan, FormulaRole role, void* exchange,
                  const FormulaLauncher& launch) {
  const bool together = plan.exchange_bytes > 0;
  const int64_t most = together ? plan.at_once : plan.teams;
  FormulaLaunch l{};
  l.role = role;
  l.tile = TileSize::kSmall;
  l.grid_y = l.grid_z = 1;
  l.threads = kFormulaPersistentThreads, l.smem_bytes = plan.shape.smem_bytes;
  l.cluster = plan.family == Family::kCluster ? plan.shape.ranks : 1;
  l.cooperative = together;
  for (int64_t first = 0; first < plan.teams; first += most) {
    arguments.teams = {plan.row_tiles, static_cast<int>(first), exchange};
    l.grid_x = static_cast<int>(std::min(most, plan.teams - first) * plan.shape.ranks);
    launch(l, &arguments, sizeof arguments);
  }
}

}  // namespace

void run_formula_persistent_forward(const FormulaForward& p, const FormulaTraits& cell, const FormulaPersistentPlan& plan,
                                    void* exchange, const FormulaLauncher& launch) {
  const FormulaRole role = plan.family == Family::kGrid ? FormulaRole::kGridForward : FormulaRole::kClusterForward;
  launch_teams(FormulaPersistentForward{p, shape_of(p, cell, plan), {}}, plan, role, exchange, launch);
}

void run_formula_persistent_backward(const FormulaBackward& p, const FormulaTraits& cell, const FormulaPersistentPlan& plan,
                                     void* exchange, const FormulaLauncher& launch) {
  const FormulaRole role = plan.family == Family::kGrid ? FormulaRole::kGridBackward : FormulaRole::kClusterBackward;
  launch_teams(FormulaPersistentBackward{p, shape_of(p, cell, plan), {}}, plan, role, exchange, launch);
}

}  // namespace fused_rnn::cuda
