// Which families may serve on a device now, and the next one where it refuses a launch.
#pragma once
#include <vector>

#include "core/recipe.h"
#include "cuda/backend.h"

namespace fused_rnn {

bool is_captured();  // by a CUDA graph, the current stream

// Whether a graph is being captured that, if it is a conditional body, could not hold a cooperative launch. Nothing tells a
// conditional body from another graph.
bool captures_without_cooperative_launches();

// FUSED_RNN_PLAN's choice for a layer, else the family of its recipe where that can serve, without the families that the
// device has refused or that have failed their verification. While a graph is captured whose conditional body could not hold
// cooperative launches, they are left out too.
FamilyChoice family_choice(int device, const Recipe& recipe);

// The family of a recipe; none: nothing is chosen.
inline std::optional<Family> family_of(const Recipe& recipe) {
  return recipe.family ? std::optional<Family>(static_cast<Family>(recipe.family - 1)) : std::nullopt;
}
constexpr int number_of(Family family) { return 1 + static_cast<int>(family); }  // in a recipe

// The families that do not serve on the device, since they have failed their verification.
void exclude_families(const std::vector<Family>& families, int device);

// From now on the family does not serve on the device; warns. Raises what was caught if FUSED_RNN_PLAN forces the family.
void family_was_refused(Family family, int device, const LaunchRefused& caught);

// The choice without the families that read x, for a call that has none.
FamilyChoice without_x(FamilyChoice choice);

// run(plan) with the plan for a problem on the device; where that refuses the launch, with the plan of the next family.
template <class Run>
void run_planned(const Problem& problem, int device, const Recipe& recipe, const Run& run, bool has_x = true) {
  for (;;) {
    FamilyChoice choice = family_choice(device, recipe);
    // A forced family without modified kernels may have served forward; the gradients of c then fall to family step.
    if (problem.backward && problem.modified && choice.forced &&
        !traits_of(*choice.forced).obstacle(problem, cuda::device_info(device)).empty()) {
      choice.forced.reset();
    }
    if (problem.dual) choice.forced.reset();  // no family but step has these kernels
    const Plan& plan = cuda::plan_for(problem, device, has_x ? choice : without_x(choice));
    const Family family = plan.family;
    try {
      return run(plan);
    } catch (const LaunchRefused& caught) {
      family_was_refused(family, device, caught);
    }
  }
}

}  // namespace fused_rnn
