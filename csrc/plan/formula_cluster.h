// The one launch of a formula's layer, family `cluster`: how many blocks a cluster has, what lies where in shared memory,
// and what a step is expected to take. A pure function of the problem and the device.
#pragma once
#include <string>

#include "plan/formula.h"
#include "plan/formula_cluster_shape.h"

namespace fused_rnn {

struct FormulaClusterPlan {
  cuda::MathKind math;
  cuda::FormulaClusterShape shape;  // but copy_vectors, which depends on addresses
  int64_t row_tiles;
  int64_t clusters, at_once;  // of the launch; how many of them run at the same time
  double us_per_step;         // of all clusters
  double us_once;             // the launch, and the weights' way into shared memory
};

// ranks: blocks of a cluster, 0: those that take least. Throws std::invalid_argument with the reason if the device cannot
// run it.
FormulaClusterPlan plan_formula_cluster(const FormulaStepProblem& problem, const DeviceInfo& device, int ranks = 0);

// For people.
std::string to_string(const FormulaClusterPlan& plan);

}  // namespace fused_rnn
