// The part of the planner (plan.h) that knows the persistent families.
#pragma once
#include "plan/plan.h"

namespace fused_rnn {

// "9.0" of 90.
std::string capability_text(int capability);

inline bool is_persistent(Family family) { return family == Family::kGrid || family == Family::kCluster; }

// Whether 32 bits number the rows of all steps, as the persistent families need it: also of some steps beyond the last, whose rows
// are computed or guessed and not used.
bool numbers_rows(const Problem& problem);

// Why the family cannot serve the problem on the device; empty if it can.
std::string persistent_obstacle(const Problem& problem, const DeviceInfo& device, Family family);

// Fills in plan for plan.family, which has no obstacle.
void plan_persistent(const Problem& problem, const DeviceInfo& device, Plan& plan);

// Multiply-adds per clock and SM.
double persistent_math_rate(cuda::MathKind math, const DeviceInfo& device);

// Clusters of so many blocks that run at once; 0: the device runs none of that size.
int64_t clusters_at_once(const DeviceInfo& device, int64_t blocks);

std::string to_string(const PersistentPlan& plan);

}  // namespace fused_rnn
