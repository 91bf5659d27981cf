// Which families may serve on a device now, and the next one where it refuses a launch.
#pragma once
#include "cuda/backend.h"

namespace fused_rnn {

// FUSED_RNN_PLAN's choice without the families that the device has refused. While a graph is captured whose conditional body
// could not hold cooperative launches, they are left out too.
FamilyChoice family_choice(int device);

// From now on the family does not serve on the device; warns. Raises what was caught if FUSED_RNN_PLAN forces the family.
void family_was_refused(Family family, int device, const LaunchRefused& caught);

// run(plan) with the plan for a problem on the device; where that refuses the launch, with the plan of the next family.
template <class Run>
void run_planned(const Problem& problem, int device, const Run& run) {
  for (;;) {
    const Plan& plan = cuda::plan_for(problem, device, family_choice(device));
    const Family family = plan.family;
    try {
      return run(plan);
    } catch (const LaunchRefused& caught) {
      family_was_refused(family, device, caught);
    }
  }
}

}  // namespace fused_rnn
