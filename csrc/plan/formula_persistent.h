// The launch of a formula's layer by a persistent family, `cluster` or `grid`: how many blocks a team has, what lies where
// in shared memory, and what a step is expected to take. A pure function of the problem and the device.
#pragma once
#include <string>

#include "plan/family.h"
#include "plan/formula.h"
#include "plan/formula_persistent_shape.h"

namespace fused_rnn {

// The compute capability from which on teams have several blocks; `grid` has no kernels below.
constexpr int kFormulaClusterCapability = 90, kFormulaGridCapability = 80;

struct FormulaPersistentPlan {
  Family family;
  cuda::MathKind math;
  cuda::FormulaPersistentShape shape;  // but copy_vectors, which depends on addresses
  int row_tiles;                       // of a group and direction
  int64_t teams, at_once;              // of the layer; how many of them run at the same time
  int launches;                        // of at_once teams; clusters: one of all
  int64_t exchange_bytes;              // of all teams, zero before the first launch
  double us_per_step;                  // of all teams
  double us_once;                      // launches, and the weights' way into shared memory
};

// ranks: blocks of a team, 0: those that take least. Throws std::invalid_argument with the reason if the device cannot run
// it.
FormulaPersistentPlan plan_formula_persistent(const FormulaStepProblem& problem, const DeviceInfo& device, Family family,
                                              int ranks = 0);

// For people.
std::string to_string(const FormulaPersistentPlan& plan);

}  // namespace fused_rnn
