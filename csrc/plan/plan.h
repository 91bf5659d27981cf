// Which CUDA kernel family serves a layer, with which tiles: a pure function of the problem and the device, printable, and
// testable without a GPU. No torch, no CUDA include.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "plan/device_info.h"
#include "plan/problem.h"
#include "plan/step_geometry.h"

namespace fused_rnn {

// kCell: one step, input and recurrent product in one kernel. kStep: one launch per step, input projection made by the caller.
// kGrid, kCluster: one launch per layer, weights held on the chip (cuda/persistent.h). These two have never run on a GPU, only
// in the simulator: no plan chooses them by itself, they must be asked for.
enum class Family : int { kCell, kStep, kGrid, kCluster };

// Who decides among the families that can serve a problem. Without either, kCell before kStep and nothing else.
struct FamilyChoice {
  std::optional<Family> forced;
  bool cheapest = false;  // the least time by the cost model, kGrid and kCluster included
};

inline bool operator==(const FamilyChoice& a, const FamilyChoice& b) {
  return a.forced == b.forced && a.cheapest == b.cheapest;
}

const char* to_string(Family family);
const char* to_string(cuda::KernelRole role);
// "cell", "step", "grid", "cluster" or "cheapest"; throws std::invalid_argument with the list of names otherwise.
FamilyChoice parse_choice(const std::string& name);

// One kernel of the plan; the launches of a step follow the order of Plan::kernels.
struct KernelPlan {
  cuda::KernelRole role;
  cuda::TileSize tile;
  cuda::MathKind math;
  int64_t grid_x, grid_y, grid_z;  // batch tiles, unit tiles, directions
  int threads;
  int stages;  // of the shared-memory ring
  int smem_bytes;
  double us;  // expected duration by the cost model of plan.cpp, whose constants are published figures, not measurements
};

// Places in the workspace, 256-byte aligned, in bytes.
struct WorkspaceLayout {
  int64_t carry, carry_bytes;  // [D, B, H] in the arithmetic type: running c (LSTM forward), running dc (LSTM backward), the
                               // part of dh that bypasses the weights (GRU backward)
  int64_t hidden, hidden_bytes;  // [D, B, H] in dtype: h before the projection (forward, P != H)
  int64_t bytes;
};
WorkspaceLayout workspace_layout(const Problem& problem);

// How a persistent family serves a layer.
struct PersistentPlan {
  cuda::MathKind math;
  int unit_tiles;  // of 16 hidden units, of a block
  int slices;      // blocks of a group (the size of the cluster)
  int tiles;       // of 8 batch rows, of a group
  int groups;      // of one direction in one launch
  int directions;  // in one launch
  int launches;
  int weight_bytes, weight_bytes_in_registers, weight_bytes_in_smem;  // of a block
  int smem_bytes;
};

struct Rejection {
  Family family;
  std::string reason;
};

// A family that could serve the problem, chosen or not, and what the cost model expects of it.
struct Candidate {
  Family family;
  double us_per_step, us;
  std::optional<PersistentPlan> persistent;
};

struct Plan {
  Family family;
  std::vector<KernelPlan> kernels;           // of the families kCell and kStep
  std::optional<PersistentPlan> persistent;  // of the others
  bool pdl;                                  // launches may overlap (code for sm_90 and newer)
  int64_t workspace_bytes;
  double us_per_step;  // sum over kernels
  double us_once;      // of the recurrence, beside its steps: launch and weights of persistent kernels
  double us;           // of the layer: all steps, us_once and, forward, the input projection
  std::string reason;
  std::vector<Rejection> rejected;
  std::vector<Candidate> candidates;
  Family cheapest;  // of the candidates: the least us
};

// Throws std::invalid_argument if no family (or not the forced one) can serve the problem on the device; the message has the
// reasons.
Plan make_plan(const Problem& problem, const DeviceInfo& device, const FamilyChoice& choice = {});

std::string to_string(const Plan& plan);

}  // namespace fused_rnn
