// The part of the planner that knows the persistent families.
#pragma once
#include "plan/plan.h"

namespace fused_rnn {

// Whether 32 bits number the rows of all steps, as the persistent kernels need it. They also number the rows of some steps
// beyond the last, computed or guessed, without using them.
bool numbers_rows(const Problem& problem);

// What stands against a persistent family before sizes matter; empty: nothing. needed: compute capability.
std::string general_obstacle(const Problem& problem, const DeviceInfo& device, int needed);

constexpr const char* kOnlySimulated = "it has run in the simulator only, never on a GPU";  // a plan's reason

std::string to_string(const PersistentPlan& plan);

}  // namespace fused_rnn
