#include "plan/formula_choice.h"

#include <cstdio>
#include <stdexcept>

#include "plan/machine.h"

namespace fused_rnn {
namespace {

constexpr Family kPersistent[] = {Family::kCluster, Family::kGrid};
constexpr bool is_persistent(Family family) { return family == kPersistent[0] || family == kPersistent[1]; }

// A persistent family's plan, or why there is none.
struct Found {
  Family family;
  std::optional<FormulaPersistentPlan> plan;
  std::string obstacle;
  double us = 0;  // of all steps
};
Found find(const FormulaStepProblem& problem, const DeviceInfo& device, const FamilyChoice& choice, Family family,
           int ranks) {
  Found found{family, std::nullopt, choice.obstacle(family)};
  if (found.obstacle.empty() && problem.reset_states) {
    found.obstacle = "its kernels replace a state by zeros alone, not by reset_state";
  }
  if (found.obstacle.empty() && problem.d_series) {
    found.obstacle = "its kernels take no gradients of the states beside the output of every step (return_all_states)";
  }
  if (!found.obstacle.empty()) return found;
  try {
    found.plan = plan_formula_persistent(problem, device, family, ranks);
    found.us = found.plan->us_once + double(problem.T) * found.plan->us_per_step;
  } catch (const std::invalid_argument& error) {
    found.obstacle = error.what();
  }
  return found;
}

std::string compared(double us, Family chosen, double chosen_us) {
  char text[120];
  std::snprintf(text, sizeof text, "%.1f us expected for the layer, %s takes %.1f", us, to_string(chosen), chosen_us);
  return text;
}

std::string unasked(Family family) {
  return std::string("never run on a GPU yet, so it is taken only when asked for (FUSED_RNN_PLAN=") + to_string(family) +
         " or cheapest)";
}

// The input product of forward, which the caller makes. 0 where its rows are not known.
double input_product_us(const FormulaStepProblem& p, const DeviceInfo& device, cuda::MathKind math) {
  if (p.backward || p.I == 0) return 0;
  const double columns = double(p.cell->input_gates) * p.H;
  return p.D * (kLaunchUs + matrix_product_us(math, double(p.T) * p.B, double(p.I), columns, device));
}

// Why family `single` cannot serve in the place of `step`; empty: it can, as far as the problem goes.
std::string single_obstacle(const FormulaStepProblem& problem, const FamilyChoice& choice) {
  if (problem.backward) return "its backward is that of step";
  if (problem.T != 1) return "serves one time step, not " + std::to_string(problem.T);
  if (problem.I == 0) return "it reads rows of the input, and makes gates of nothing else (ids, values that are given)";
  if (choice.forced && *choice.forced != Family::kSingle) return std::string(to_string(*choice.forced)) + " is forced";
  return choice.obstacle(Family::kSingle);
}

}  // namespace

FormulaPlan plan_formula(const FormulaStepProblem& problem, const DeviceInfo& device, const FamilyChoice& choice,
                         int ranks) {
  FormulaPlan plan{};
  FormulaStepPlan step = plan_formula_step(problem, device);
  const double input_us = input_product_us(problem, device, step.math);
  double step_us = input_us + double(problem.T) * step.us_per_step;
  plan.candidates.push_back({Family::kStep, step.us_per_step, step_us, std::nullopt});
  // One of the two serves every formula.
  std::string no_single = single_obstacle(problem, choice);
  if (no_single.empty()) {
    try {
      const FormulaStepPlan single = plan_formula_step(problem, device, Family::kSingle);
      plan.candidates.push_back({Family::kSingle, single.us_per_step, single.us_per_step, std::nullopt});
      if (single.us_per_step < step_us || choice.forced == Family::kSingle) {
        plan.rejected.push_back(
            {Family::kStep, choice.forced ? "single is forced" : compared(step_us, Family::kSingle, single.us_per_step)});
        step = single, step_us = single.us_per_step;
      } else {
        no_single = compared(single.us_per_step, Family::kStep, step_us);
      }
    } catch (const std::invalid_argument& error) {
      no_single = error.what();
    }
  }
  plan.family = plan.cheapest = step.family;
  double cheapest_us = step_us;
  std::vector<Found> found;
  for (Family family : kPersistent) {
    found.push_back(find(problem, device, choice, family, ranks));
    Found& one = found.back();
    one.us += input_us;
    if (!one.plan) continue;
    plan.candidates.push_back({family, one.plan->us_per_step, one.us, std::nullopt});
    if (one.us < cheapest_us) plan.cheapest = family, cheapest_us = one.us;
    if (choice.forced == family) plan.family = family;
  }
  if (choice.cheapest) plan.family = plan.cheapest;

  const bool forced = choice.forced && plan.family == *choice.forced;
  plan.reason = forced                           ? "it is forced"
                : choice.cheapest                ? "it is the cheapest by the cost model"
                : plan.family == Family::kSingle ? "it makes the input products of the one step too"
                                                 : "it serves every formula";
  const std::string is_forced = choice.forced ? std::string(to_string(*choice.forced)) + " is forced" : "";
  for (Family family : kFamilies) {
    if (family == Family::kStep || family == Family::kSingle || is_persistent(family)) continue;
    plan.rejected.push_back({family, "formulas have no kernels of this family"});
  }
  for (const Found& one : found) {
    if (one.family == plan.family) continue;
    plan.rejected.push_back({one.family, !one.plan         ? one.obstacle
                                         : choice.forced   ? is_forced
                                         : choice.cheapest ? compared(one.us, plan.family, cheapest_us)
                                                           : unasked(one.family)});
  }
  if (!no_single.empty()) plan.rejected.push_back({Family::kSingle, no_single});
  if (plan.family == step.family) {
    plan.step = step;
    plan.launches = problem.T * static_cast<int64_t>(step.segments.size()) + problem.backward;
    plan.overlapped = step.pdl;
    plan.workspace_bytes = step.workspace.bytes;
    plan.us_per_step = step.us_per_step, plan.us = step_us;
    return plan;
  }
  plan.rejected.push_back({step.family, forced ? is_forced : compared(step_us, plan.family, cheapest_us)});
  for (const Found& one : found) {
    if (one.family != plan.family) continue;
    plan.persistent = one.plan;
    plan.launches = one.plan->launches;
    plan.workspace_bytes = one.plan->exchange_bytes;
    plan.us_per_step = one.plan->us_per_step, plan.us = one.us;
  }
  return plan;
}

std::string to_string(const FormulaPlan& plan) {
  std::string text = std::string("family ") + to_string(plan.family) + ", since " + plan.reason + ": " +
                     (plan.persistent ? to_string(*plan.persistent) : to_string(*plan.step));
  text += "\n  could serve, us per step (for the layer) by the model:";
  char line[100];
  for (const Candidate& c : plan.candidates) {
    std::snprintf(line, sizeof line, "%s %s %.2f (%.1f)", c.family == plan.candidates[0].family ? "" : ",",
                  to_string(c.family), c.us_per_step, c.us);
    text += line;
  }
  text += std::string("; cheapest: ") + to_string(plan.cheapest);
  for (const Rejection& r : plan.rejected) text += std::string("\n  not ") + to_string(r.family) + ": " + r.reason;
  return text;
}

}  // namespace fused_rnn
