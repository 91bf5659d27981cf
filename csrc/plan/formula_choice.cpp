#include "plan/formula_choice.h"

#include <cstdio>
#include <stdexcept>

namespace fused_rnn {
namespace {

// The cluster's plan, or why there is none.
std::optional<FormulaClusterPlan> plan_cluster(const FormulaStepProblem& problem, const DeviceInfo& device,
                                               const FamilyChoice& choice, int ranks, std::string& reason) {
  reason = choice.obstacle(Family::kCluster);
  if (!reason.empty()) return std::nullopt;
  try {
    return plan_formula_cluster(problem, device, ranks);
  } catch (const std::invalid_argument& error) {
    reason = error.what();
    return std::nullopt;
  }
}

std::string compared(double us, Family chosen, double chosen_us) {
  char text[120];
  std::snprintf(text, sizeof text, "%.1f us expected for the layer, %s takes %.1f", us, to_string(chosen), chosen_us);
  return text;
}

}  // namespace

FormulaPlan plan_formula(const FormulaStepProblem& problem, const DeviceInfo& device, const FamilyChoice& choice,
                         int ranks) {
  const FormulaStepPlan step = plan_formula_step(problem, device);
  const double step_us = double(problem.T) * step.us_per_step;
  std::string obstacle;
  const std::optional<FormulaClusterPlan> cluster = plan_cluster(problem, device, choice, ranks, obstacle);
  const double cluster_us = cluster ? cluster->us_once + double(problem.T) * cluster->us_per_step : 0;

  FormulaPlan plan{};
  plan.candidates.push_back({Family::kStep, step.us_per_step, step_us, std::nullopt});
  if (cluster) plan.candidates.push_back({Family::kCluster, cluster->us_per_step, cluster_us, std::nullopt});
  plan.cheapest = cluster && cluster_us < step_us ? Family::kCluster : Family::kStep;
  const bool asked = choice.forced == Family::kCluster || choice.cheapest;
  plan.family = !cluster                            ? Family::kStep
                : choice.forced == Family::kCluster ? Family::kCluster
                : choice.cheapest                   ? plan.cheapest
                                                    : Family::kStep;
  for (Family family : kFamilies) {
    if (family == Family::kStep || family == Family::kCluster) continue;
    plan.rejected.push_back({family, "formulas have no kernels of this family"});
  }
  if (plan.family == Family::kStep && cluster) {
    plan.rejected.push_back({Family::kCluster, choice.forced ? std::string(to_string(*choice.forced)) + " is forced"
                                               : choice.cheapest
                                                   ? compared(cluster_us, Family::kStep, step_us)
                                                   : "never run on a GPU yet, so it is taken only when asked for "
                                                     "(FUSED_RNN_PLAN=cluster or cheapest)"});
  } else if (plan.family == Family::kStep) {
    plan.rejected.push_back({Family::kCluster, obstacle});
  } else {
    plan.rejected.push_back(
        {Family::kStep, choice.forced ? "cluster is forced" : compared(step_us, Family::kCluster, cluster_us)});
  }
  plan.reason = plan.family == Family::kCluster  ? (choice.forced ? "it is forced" : "it is the cheapest by the cost model")
                : choice.forced == Family::kStep ? "it is forced"
                : asked && cluster               ? "it is the cheapest by the cost model"
                                                 : "it serves every formula";
  if (plan.family == Family::kCluster) {
    plan.cluster = cluster;
    plan.launches = 1;
    plan.us_per_step = cluster->us_per_step, plan.us = cluster_us;
  } else {
    plan.step = step;
    plan.launches = problem.T * static_cast<int64_t>(step.segments.size()) + problem.backward;
    plan.overlapped = step.pdl;
    plan.workspace_bytes = step.workspace.bytes;
    plan.us_per_step = step.us_per_step, plan.us = step_us;
  }
  return plan;
}

std::string to_string(const FormulaPlan& plan) {
  std::string text = std::string("family ") + to_string(plan.family) + ", since " + plan.reason + ": " +
                     (plan.cluster ? to_string(*plan.cluster) : to_string(*plan.step));
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
