// Which family runs a formula's layer on a GPU: `single`, `step`, `cluster` or `grid`. Others have no kernels of formulas.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "plan/formula.h"
#include "plan/formula_persistent.h"
#include "plan/plan.h"

namespace fused_rnn {

struct FormulaPlan {
  Family family;
  std::optional<FormulaStepPlan> step;              // of the families `step` and `single` alone
  std::optional<FormulaPersistentPlan> persistent;  // of the persistent families alone
  int64_t launches;
  bool overlapped;          // launches may overlap
  int64_t workspace_bytes;  // of a persistent family zeros
  double us_per_step;
  double us;  // of all steps and, forward, the input product where the caller makes it
  std::string reason;
  std::vector<Rejection> rejected;
  std::vector<Candidate> candidates;
  Family cheapest;
};

// choice: a forced family serves where it has kernels and room, else `step`. ranks: plan_formula_persistent. Throws
// std::invalid_argument if the device can launch nothing.
FormulaPlan plan_formula(const FormulaStepProblem& problem, const DeviceInfo& device, const FamilyChoice& choice,
                         int ranks = 0);

// For people.
std::string to_string(const FormulaPlan& plan);

}  // namespace fused_rnn
