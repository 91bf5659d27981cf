// Who launches the kernels of each family (plan/family.h): one row a family.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/backend.h"

namespace fused_rnn::cuda {

// Launches the steps of a range. Only persistent families are given less than the whole sequence.
template <class Params>
using Launcher = void(const Params& params, const Plan& plan, const StepRange& range, void* stream);

// step_launch.cu
Launcher<ForwardParams> step_forward;
Launcher<BackwardParams> step_backward;
// second_order_launch.cu: what step_forward does where p.primal is given, and the backward of dual numbers.
void step_tangents(const ForwardParams& p, const Plan& plan, void* stream);
void step_dual_backward(const DualBackwardParams& p, const Plan& plan, void* stream);
// persistent_launch.cu
Launcher<ForwardParams> grid_forward, cluster_forward;
Launcher<BackwardParams> grid_backward, cluster_backward;
// block_launch.cu
Launcher<ForwardParams> block_forward;
Launcher<BackwardParams> block_backward;
// gemm_launch.cu
Launcher<ForwardParams> gemm_forward;
Launcher<BackwardParams> gemm_backward;

// Of families that serve whole stacks, which csrc/torch calls.
template <class Params>
void no_launch(const Params&, const Plan& plan, const StepRange&, void*) {
  throw std::invalid_argument(std::string(to_string(plan.family)) + " has no kernels of ours");
}

struct FamilyLaunchers {
  Family family;
  Launcher<ForwardParams>* forward;
  Launcher<BackwardParams>* backward;
};

constexpr FamilyLaunchers kLaunchers[] = {
    {Family::kSingle, step_forward, step_backward},
    {Family::kStep, step_forward, step_backward},
    {Family::kGrid, grid_forward, grid_backward},
    {Family::kCluster, cluster_forward, cluster_backward},
    {Family::kBlock, block_forward, block_backward},
    {Family::kGemm, gemm_forward, gemm_backward},
    {Family::kCudnn, no_launch<ForwardParams>, no_launch<BackwardParams>},
};

constexpr bool has_row(Family family) {
  for (const FamilyLaunchers& row : kLaunchers) {
    if (row.family == family) return true;
  }
  return false;
}
#define FUSED_RNN_FAMILY(kind, ...) static_assert(has_row(Family::kind), "kLaunchers has no row for Family::" #kind);
FUSED_RNN_FAMILIES(FUSED_RNN_FAMILY)
#undef FUSED_RNN_FAMILY

inline const FamilyLaunchers& launchers_of(Family family) {
  for (const FamilyLaunchers& row : kLaunchers) {
    if (row.family == family) return row;
  }
  throw std::invalid_argument("unknown kernel family");
}

}  // namespace fused_rnn::cuda
