// Which CUDA kernel family serves a layer, with which tiles: a pure function of the problem and the device, printable, and
// testable without a GPU. No torch, no CUDA include.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "plan/device_info.h"
#include "plan/family.h"
#include "plan/problem.h"
#include "plan/step_geometry.h"

namespace fused_rnn {

// Who decides among the families that can serve a problem. By default it is the first automatic one in the order of the
// list.
struct FamilyChoice {
  std::optional<Family> forced;
  bool cheapest = false;              // the least time by the cost model, over all families
  unsigned refused = 0;               // a bit for each family whose launch the device has refused, or would refuse now
  unsigned excluded = 0;              // a bit for each family that has failed its verification on the device
  unsigned unverified = 0;            // of a formula: a bit for each family whose kernels have not been compared yet
  std::optional<Family> preferred{};  // serves where it can and nothing is forced

  // Why the family may not serve now; empty: it may.
  const char* obstacle(Family family) const {
    if (excluded >> static_cast<int>(family) & 1) return "it has failed its verification on this device";
    if (unverified >> static_cast<int>(family) & 1) return "its kernels of this formula have not been verified";
    return refused >> static_cast<int>(family) & 1 ? "the device does not take its launches now" : "";
  }
};

inline bool operator==(const FamilyChoice& a, const FamilyChoice& b) {
  return a.forced == b.forced && a.cheapest == b.cheapest && a.refused == b.refused && a.excluded == b.excluded &&
         a.unverified == b.unverified && a.preferred == b.preferred;
}

// The name of a family, or "cheapest"; throws std::invalid_argument with the list of names otherwise.
FamilyChoice parse_choice(const std::string& name);

// One kernel of the plan; the launches of a step follow the order of Plan::kernels.
struct KernelPlan {
  cuda::KernelRole role;
  cuda::TileSize tile;
  cuda::MathKind math;
  int64_t grid_x, grid_y, grid_z;  // row tiles, tiles of units, directions
  int threads;
  int stages;  // of the shared-memory ring
  int smem_bytes;
  double us;  // expected duration, by the cost model (machine.h)
};

// How a persistent family serves a layer.
struct PersistentPlan {
  cuda::MathKind math;
  bool cluster;        // the blocks of a group are a cluster
  int unit_tiles;      // of 16 hidden units, of a block; 0 in family `block`
  int slices;          // blocks of a group
  int row_tiles;       // of 8 batch rows, or of `rows` if these are fewer, of a group
  int threads, units;  // of a block
  int rows;            // of a group
  int groups;          // of one direction in one launch
  int directions;      // in one launch
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
  std::vector<KernelPlan> kernels;           // of the families with launches for every step
  std::optional<PersistentPlan> persistent;  // of the persistent families
  int products;                              // of a step by a library (family kGemm), of all directions
  bool pdl;                                  // launches may overlap (code for sm_90 and newer)
  int64_t workspace_bytes;
  double us_per_step;  // sum over kernels
  double us_once;      // of the recurrence, beside its steps: launch and weights of persistent kernels
  double us;           // of the layer: all steps, us_once and, forward, the caller's input product
  std::string reason;
  std::vector<Rejection> rejected;
  std::vector<Candidate> candidates;
  Family cheapest;  // of the candidates: the least us
};

// Throws std::invalid_argument if no family (or not the forced one) can serve the problem on the device; the message has the
// reasons.
Plan make_plan(const Problem& problem, const DeviceInfo& device, const FamilyChoice& choice = {});

std::string to_string(const Plan& plan);

// The arithmetic of a problem. TF32 needs code for sm_80; older code computes in fp32, whatever torch allows.
inline cuda::MathKind math_of(const Problem& problem, const DeviceInfo& device) {
  return cuda::math_kind(problem.dtype, problem.allow_tf32 && device.compiled_for >= 80);
}

}  // namespace fused_rnn
