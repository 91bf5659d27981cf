// The families of CUDA kernels, as a list: what the planner asks of each. csrc/cuda/family.h has their launchers.
#pragma once
#include <string>

#include "plan/device_info.h"
#include "plan/problem.h"

namespace fused_rnn {

struct Plan;  // plan.h

// The obstacle of families without kernels for a problem that is `modified`.
constexpr const char* kNoModifiedKernels =
    "has no kernels with zoneout, recurrent dropout, clipped states, reset states or gradients of every c";
// The same where it is `dual`.
constexpr const char* kNoDualKernels = "has no kernels of tangents";

// Every family, once, in the order in which plans prefer them. The enum, the names and the planner's loop are made of this
// list.
//   X(kind, name, persistent, reads_x, automatic, stacks, obstacle, plan)
//   persistent  one launch makes all steps, or a range of them, with the weights held on the chip; else every step has its
//               launches
//   reads_x     forward reads x and makes the input product itself; else the caller leaves that product in `gates`
//   automatic   plans take it by themselves; else it must be asked for
//   stacks      serves whole stacks (csrc/torch/cudnn_cuda.h), and is no candidate for one layer among others
//   obstacle    a function: why the family cannot serve a problem on a device, empty if it can
//   plan        a function: fills in a plan whose family is set and has no obstacle; throws std::invalid_argument with the
//               reason if the device turns out to lack the room
// kSingle: one step, both products in one kernel. kStep: one or two launches a step. kGrid and kCluster: one launch a layer,
// whose blocks exchange states through L2 or inside clusters. kBlock: the same with all units in one block, which has
// nothing to exchange. kGemm: products of all rows by a library's matrix product, then a pointwise kernel. None of these has
// run on a GPU yet, only in the simulator.
// kCudnn: NVIDIA's library, through torch.
#define FUSED_RNN_FAMILIES(X)                                                        \
  X(kSingle, "single", false, true, true, false, single_obstacle, plan_step_kernels) \
  X(kStep, "step", false, false, true, false, step_obstacle, plan_step_kernels)      \
  X(kGrid, "grid", true, false, false, false, grid_obstacle, plan_grid)              \
  X(kCluster, "cluster", true, false, false, false, cluster_obstacle, plan_cluster)  \
  X(kBlock, "block", true, false, false, false, block_obstacle, plan_block)          \
  X(kGemm, "gemm", false, false, false, false, gemm_obstacle, plan_gemm)             \
  X(kCudnn, "cudnn", false, true, false, true, cudnn_obstacle, plan_cudnn)

enum class Family : int {
#define FUSED_RNN_FAMILY(kind, ...) kind,
  FUSED_RNN_FAMILIES(FUSED_RNN_FAMILY)
#undef FUSED_RNN_FAMILY
};

constexpr Family kFamilies[] = {
#define FUSED_RNN_FAMILY(kind, ...) Family::kind,
    FUSED_RNN_FAMILIES(FUSED_RNN_FAMILY)
#undef FUSED_RNN_FAMILY
};

#define FUSED_RNN_FAMILY(kind, name, persistent, reads_x, automatic, stacks, obstacle, plan) \
  std::string obstacle(const Problem& problem, const DeviceInfo& device);                    \
  void plan(const Problem& problem, const DeviceInfo& device, Plan& plan);
FUSED_RNN_FAMILIES(FUSED_RNN_FAMILY)
#undef FUSED_RNN_FAMILY

// What the list says of one family.
struct FamilyTraits {
  const char* name;
  bool persistent, reads_x, automatic, stacks;
  std::string (*obstacle)(const Problem& problem, const DeviceInfo& device);
  void (*plan)(const Problem& problem, const DeviceInfo& device, Plan& plan);
};

constexpr FamilyTraits traits_of(Family family) {
  switch (family) {
#define FUSED_RNN_FAMILY(kind, ...) \
  case Family::kind: return {__VA_ARGS__};
    FUSED_RNN_FAMILIES(FUSED_RNN_FAMILY)
#undef FUSED_RNN_FAMILY
  }
  return {};
}

constexpr const char* to_string(Family family) { return traits_of(family).name; }

}  // namespace fused_rnn
