// The part of the planner that knows the persistent families.
#pragma once
#include "plan/plan.h"

namespace fused_rnn {

// Whether 32 bits number the rows of all steps, as the persistent kernels need it. They also number the rows of some steps
// beyond the last, computed or guessed, without using them.
bool numbers_rows(const Problem& problem);

std::string to_string(const PersistentPlan& plan);

}  // namespace fused_rnn
