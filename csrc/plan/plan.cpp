// The planner: see plan.h.
#include "plan/plan.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "plan/machine.h"
#include "plan/persistent.h"
#include "plan/step.h"

namespace fused_rnn {
namespace {

void check_problem(const Problem& p, const DeviceInfo& device) {
  if (p.T < 1 || p.B < 1 || p.H < 1 || p.P < 1 || p.I < 0 || p.D < 1 || p.D > 2) {
    throw std::invalid_argument("a layer needs T, B, H, P >= 1, I >= 0 and 1 or 2 directions");
  }
  if (p.P != p.H && !traits_of(p.cell).may_project) {
    throw std::invalid_argument("P: expected H = " + std::to_string(p.H) + " for " + traits_of(p.cell).name +
                                ", which has no projection, got " + std::to_string(p.P));
  }
  if (p.P > p.H) throw std::invalid_argument("proj_size must be smaller than the hidden size");
  if (device.compute_capability < 75) {
    throw std::invalid_argument("compute capability " + capability_text(device.compute_capability) + " is older than 7.5");
  }
  if (device.compiled_for < 75) {
    throw std::invalid_argument("the kernels were not compiled for compute capability " +
                                capability_text(device.compute_capability) + ", nor to PTX that it can run: add it to " +
                                "TORCH_CUDA_ARCH_LIST and build again");
  }
}

// A matrix product [rows, inputs] x [inputs, columns] on all SMs with everything in L2, beside its launch.
double product_us(const Problem& p, const DeviceInfo& device, double rows, double inputs, double columns) {
  return matrix_product_us(math_of(p, device), rows, inputs, columns, device);
}

// The input product of forward, which families that do not read x leave to the caller, and cuDNN makes beside its steps.
double input_product_us(const Problem& p, const DeviceInfo& device) {
  const double rows = double(p.T) * p.B, columns = double(gate_count(p.cell)) * p.H;
  return p.D * (kLaunchUs + product_us(p, device, rows, double(p.I), columns));
}

// The recurrent product of one step, of both directions, with weights from L2 or, where they do not stay there, from memory.
double step_product_us(const Problem& p, const DeviceInfo& device) {
  const double columns = double(gate_count(p.cell)) * p.H;
  return std::max(p.D * product_us(p, device, double(p.B), double(p.P), columns),
                  dram_us(p.D * double(p.P) * columns * dtype_size(p.dtype), device));
}

// Kernels, memory and cost of a family that has no obstacle.
Plan plan_of(const Problem& problem, const DeviceInfo& device, Family family) {
  Plan plan{};
  plan.family = family;
  const FamilyTraits traits = traits_of(family);
  traits.plan(problem, device, plan);
  // Published is what a step of cuDNN takes at least.
  if (traits.stacks) plan.us_per_step = std::max(plan.us_per_step, step_product_us(problem, device));
  plan.us = plan.us_once + problem.T * plan.us_per_step;
  if (!problem.backward && (!traits.reads_x || traits.stacks)) plan.us += input_product_us(problem, device);
  return plan;
}

// Of the plans of the families that can serve the problem, in their order; null if it may be none of them.
const Plan* choose(const std::vector<Plan>& plans, const FamilyChoice& choice) {
  const Plan* chosen = nullptr;
  if (!choice.forced && !choice.cheapest) {
    for (const Plan& plan : plans) {
      if (plan.family == choice.preferred) return &plan;
    }
  }
  for (const Plan& plan : plans) {
    if (choice.forced ? plan.family != *choice.forced : !choice.cheapest && !traits_of(plan.family).automatic) continue;
    if (!chosen || (choice.cheapest && plan.us < chosen->us)) chosen = &plan;
  }
  return chosen;
}

// Why another plan than this is taken.
std::string rejection(const Plan& plan, const Plan* chosen, const FamilyChoice& choice) {
  if (choice.forced) return std::string(to_string(*choice.forced)) + " is forced";
  const std::string name = to_string(plan.family);
  if (choice.cheapest) {
    char text[100];
    std::snprintf(text, sizeof text, "%.1f us expected for the layer, %s takes %.1f", plan.us, to_string(chosen->family),
                  chosen->us);
    return text;
  }
  if (chosen && choice.preferred == chosen->family)
    return std::string(to_string(chosen->family)) + " is chosen for this call";
  if (!traits_of(plan.family).automatic) {
    return "never run on a GPU yet, so it is taken only when asked for (FUSED_RNN_PLAN=" + name + " or cheapest)";
  }
  return std::string(to_string(chosen->family)) + " serves it with one launch less";
}

}  // namespace

FamilyChoice parse_choice(const std::string& name) {
  if (name == "cheapest") return {std::nullopt, true};
  std::string known;
  for (Family family : kFamilies) {
    if (name == to_string(family)) return {family, false};
    known += std::string(to_string(family)) + ", ";
  }
  throw std::invalid_argument("unknown kernel family '" + name + "'; known are: " + known + "and cheapest of them");
}

Plan make_plan(const Problem& problem, const DeviceInfo& device, const FamilyChoice& choice) {
  check_problem(problem, device);
  std::vector<Plan> plans;
  std::vector<Rejection> rejected;
  std::vector<Candidate> candidates;
  for (Family family : kFamilies) {
    if (traits_of(family).stacks && choice.forced != family && choice.preferred != family) continue;
    std::string reason = choice.obstacle(family);
    if (reason.empty()) reason = traits_of(family).obstacle(problem, device);
    if (reason.empty()) {
      try {
        plans.push_back(plan_of(problem, device, family));
        const Plan& plan = plans.back();
        candidates.push_back({family, plan.us_per_step, plan.us, plan.persistent});
      } catch (const std::invalid_argument& error) {
        reason = error.what();
      }
    }
    if (!reason.empty()) rejected.push_back({family, reason});
  }
  const Plan* const chosen = choose(plans, choice);
  for (const Plan& plan : plans) {
    if (&plan != chosen) rejected.push_back({plan.family, rejection(plan, chosen, choice)});
  }
  std::sort(rejected.begin(), rejected.end(),
            [](const Rejection& a, const Rejection& b) { return static_cast<int>(a.family) < static_cast<int>(b.family); });
  if (!chosen) {
    std::string message = choice.forced
                              ? std::string("kernel family ") + to_string(*choice.forced) + " cannot serve this layer"
                              : "no kernel family can serve this layer";
    for (const Rejection& one : rejected) {
      if (choice.forced && one.family != *choice.forced) continue;
      message += std::string(": ") + to_string(one.family) + " " + one.reason;
    }
    throw std::invalid_argument(message);
  }
  Plan plan = *chosen;
  const char* const why = choice.forced                     ? " is forced; "
                          : choice.cheapest                 ? " is the cheapest by the cost model; "
                          : choice.preferred == plan.family ? " is chosen for this call; "
                                                            : nullptr;
  if (why) plan.reason = std::string(to_string(plan.family)) + why + plan.reason;
  plan.rejected = std::move(rejected);
  const auto cheaper = [](const Candidate& a, const Candidate& b) { return a.us < b.us; };
  plan.cheapest = std::min_element(candidates.begin(), candidates.end(), cheaper)->family;
  plan.candidates = std::move(candidates);
  return plan;
}

std::string to_string(const Plan& plan) {
  char line[256];
  std::snprintf(line, sizeof line, "family %s, %.1f us per step expected (model, not measured), workspace %lld bytes%s\n",
                to_string(plan.family), plan.us_per_step, static_cast<long long>(plan.workspace_bytes),
                plan.pdl ? ", overlapped launches" : "");
  std::string text = line;
  text += to_string(plan.kernels);
  if (plan.persistent) text += to_string(*plan.persistent);
  text += "  because " + plan.reason + "\n";
  text += "  could serve, us per step (for the layer) by the model:";
  for (const Candidate& c : plan.candidates) {
    std::snprintf(line, sizeof line, "%s %s %.2f (%.1f)", c.family == plan.candidates[0].family ? "" : ",",
                  to_string(c.family), c.us_per_step, c.us);
    text += line;
  }
  text += std::string("; cheapest: ") + to_string(plan.cheapest) + "\n";
  for (const Rejection& r : plan.rejected) text += std::string("  not ") + to_string(r.family) + ": " + r.reason + "\n";
  return text;
}

}  // namespace fused_rnn
