// The launches of a formula's layer on a GPU, families `step` and `single`: which tile, how much shared and working memory.
// A pure function of the problem and the device. Segments: cuda/formula/formula_params.h.
#pragma once
#include <string>
#include <vector>

#include "core/formula.h"
#include "plan/device_info.h"
#include "plan/family.h"
#include "plan/step_geometry.h"

namespace fused_rnn {

struct FormulaStepProblem {
  const FormulaTraits* cell;
  DType dtype;
  int64_t T, B, H;
  int D, heads;
  bool backward;
  bool reset_states;  // resets put states of their own
  bool d_series;      // of backward: there are gradients of states after each step
  int64_t I;  // of forward: columns of the input's rows; 0: there are none to read (ids), or not alone (values of gates)
};

// One kernel; grid.z is D.
struct FormulaKernelPlan {
  cuda::TileSize tile;
  int64_t grid_x, grid_y;
  int threads, stages, smem_bytes;
  double us;  // by the cost model of machine.h
};

// Where working memory lies: offsets in bytes, aligned to 256; -1: not there. In the order of cuda/formula/formula_params.h.
struct FormulaWorkspace {
  int64_t states[kMostFormulaStates];  // backward: d_states
  int64_t recurrent;                   // backward: d_rec
  int64_t rec;
  int64_t taken[kMostFormulaPhases];    // backward: d_results, of norms
  int64_t results[kMostFormulaPhases];  // backward: d_taken
  int64_t bytes;
};

struct FormulaStepPlan {
  Family family;
  cuda::MathKind math;
  bool pdl;                                 // launches may overlap
  std::vector<FormulaKernelPlan> segments;  // [levels of phases + 1]
  FormulaKernelPlan initial;                // backward: of the gradients of the initial states
  FormulaWorkspace workspace;
  double us_per_step;
};

// family: kStep, or kSingle, whose first segment makes the input products of one time step too. Throws std::invalid_argument
// if the device cannot launch it.
FormulaStepPlan plan_formula_step(const FormulaStepProblem& problem, const DeviceInfo& device,
                                  Family family = Family::kStep);

// Launches of a step, tiles, shared and working memory, for people.
std::string to_string(const FormulaStepPlan& plan);

}  // namespace fused_rnn
