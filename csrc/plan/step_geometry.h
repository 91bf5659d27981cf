// Tile geometry of the step kernels, shared by the kernels (compile time) and the planner (run time). No CUDA include.
//
// Every kernel of the family multiplies a weight operand by the rows of a state:
//   acc[slot][u][b] = sum_k weight[slot's group][u][k] * state[b][k]
// A block owns `units` units (with all gates of each) times `batch` batch rows. Its warps form `teams`, to which the K
// chunks are dealt in turn. Each team has its own ring of stages in shared memory. The teams meet once, at the end, when the
// partial sums are added in a fixed order. Inside a team, warps_u x warps_b warps split units and batch.
#pragma once
#include "plan/math_kind.h"

namespace fused_rnn::cuda {

// kForward: recurrent product, bias, gates. kForwardInput: the same with the input product. kProject: the product of a
// projection, W_hr. kBackward: product with W_hh (or W_hr) and the cell's derivative. kStateGrad: total gradient of a state
// h.
// kForwardModified, kBackwardModified: kForward and kBackward with what Modifier has beside resets to zeros
// (core/modifier.h), and the gradients of every c.
// kTangents, kProjectTangents: kForward and kProject of tangents. kDualBackward, kDualStateGrad: kBackward and kStateGrad of
// dual numbers, whose values and tangents are rows of their own in the product.
enum class KernelRole : int {
  kForward,
  kForwardInput,
  kProject,
  kBackward,
  kStateGrad,
  kForwardModified,
  kBackwardModified,
  kTangents,
  kProjectTangents,
  kDualBackward,
  kDualStateGrad
};
// kPointwise: of family `gemm`, whose kernels make no product.
enum class TileSize : int { kSmall, kMedium, kLarge, kPointwise };

constexpr const char* to_string(KernelRole role) {
  switch (role) {
    case KernelRole::kForward: return "forward";
    case KernelRole::kForwardInput: return "forward_input";
    case KernelRole::kProject: return "project";
    case KernelRole::kBackward: return "backward";
    case KernelRole::kStateGrad: return "state_grad";
    case KernelRole::kForwardModified: return "forward_modified";
    case KernelRole::kBackwardModified: return "backward_modified";
    case KernelRole::kTangents: return "tangents";
    case KernelRole::kProjectTangents: return "project_tangents";
    case KernelRole::kDualBackward: return "dual_backward";
    case KernelRole::kDualStateGrad: return "dual_state_grad";
  }
  return "?";
}
constexpr const char* to_string(TileSize size) {
  switch (size) {
    case TileSize::kSmall: return "small";
    case TileSize::kMedium: return "medium";
    case TileSize::kLarge: return "large";
    case TileSize::kPointwise: return "pointwise";
  }
  return "?";
}

constexpr bool is_modified(KernelRole role) {
  return role == KernelRole::kForwardModified || role == KernelRole::kBackwardModified;
}
constexpr KernelRole forward_role(bool reads_x, bool modified) {
  return modified ? KernelRole::kForwardModified : reads_x ? KernelRole::kForwardInput : KernelRole::kForward;
}
constexpr KernelRole backward_role(bool modified) {
  return modified ? KernelRole::kBackwardModified : KernelRole::kBackward;
}

constexpr bool is_gated(KernelRole role) {
  return role == KernelRole::kForward || role == KernelRole::kForwardInput || role == KernelRole::kForwardModified ||
         role == KernelRole::kTangents;
}
// Whether the batch rows of a tile are values, half of them, and the tangents of the same rows.
constexpr bool is_dual(KernelRole role) { return role == KernelRole::kDualBackward || role == KernelRole::kDualStateGrad; }
// Rows of a layer of B batch rows that the tiles of a kernel hold.
constexpr int64_t tile_rows(KernelRole role, int64_t B) { return is_dual(role) ? 2 * B : B; }
// Whether the weight operand is stored [units][K] (K contiguous) or [K][units].
constexpr bool is_unit_major(KernelRole role) {
  return role == KernelRole::kBackward || role == KernelRole::kStateGrad || role == KernelRole::kBackwardModified ||
         is_dual(role);
}

// The largest tile is compiled for tensor cores only.
constexpr bool has_tile(MathKind math, TileSize size) { return size != TileSize::kLarge || traits_of(math).tensor_cores; }

struct TileShape {
  int units, batch;
  int warps_u, warps_b;
  int teams;
};

constexpr TileShape tile_shape(KernelRole role, MathKind math, TileSize size) {
  // A warp has one row, so that it branches as one; a thread has one element.
  if (size == TileSize::kPointwise) return {32, 8, 2, 1, 4};
  if (is_gated(role)) {
    switch (size) {
      case TileSize::kSmall: return {16, 8, 1, 1, 4};
      case TileSize::kMedium: return {16, math == MathKind::kFp64 ? 16 : 32, 1, 1, 4};
      case TileSize::kLarge: return {32, 64, 2, 2, 2};
      case TileSize::kPointwise: break;
    }
  }
  switch (size) {
    case TileSize::kSmall: return {16, 8, 1, 1, 8};
    case TileSize::kMedium: return {32, math == MathKind::kFp64 ? 16 : 32, 1, 1, 4};
    case TileSize::kLarge: return {64, 64, 2, 2, 2};
    case TileSize::kPointwise: break;
  }
  return {};
}

constexpr int kChunkBytes = 64;  // of K in one stage, per row
constexpr int kMinStages = 2, kMaxStages = 8;

constexpr int tile_threads(const TileShape& tile) { return 32 * tile.warps_u * tile.warps_b * tile.teams; }
constexpr int chunk_size(MathKind math) { return kChunkBytes / storage_bytes(math); }

// Weight rows that a block loads for each unit. Accumulators of a unit: where input and recurrent product are both summed, n
// of a GRU has one for each.
constexpr int weight_groups(KernelRole role, CellKind cell) { return is_gated(role) ? gate_count(cell) : 1; }
constexpr int accumulator_slots(KernelRole role, CellKind cell) {
  return role == KernelRole::kForwardInput ? slot_count(cell) : weight_groups(role, cell);
}
constexpr int operand_count(KernelRole role) { return role == KernelRole::kForwardInput || is_dual(role) ? 2 : 1; }

// Row pitch of a unit-major weight stage [chunk][units], padded so that the fragment loads of a warp meet no bank twice.
constexpr int unit_pitch_bytes(const TileShape& tile, MathKind math) {
  const int padding = !traits_of(math).tensor_cores ? 0 : storage_bytes(math) == 2 ? 16 : 32;
  return tile.units * storage_bytes(math) + padding;
}
// groups: weight rows of each unit (weight_groups).
constexpr int weight_stage_bytes(KernelRole role, int groups, MathKind math, const TileShape& tile) {
  return is_unit_major(role) ? chunk_size(math) * unit_pitch_bytes(tile, math) : groups * tile.units * kChunkBytes;
}
constexpr int weight_stage_bytes(KernelRole role, CellKind cell, MathKind math, const TileShape& tile) {
  return weight_stage_bytes(role, weight_groups(role, cell), math, tile);
}
constexpr int stage_bytes(KernelRole role, int groups, MathKind math, const TileShape& tile) {
  return weight_stage_bytes(role, groups, math, tile) + tile.batch * kChunkBytes;
}
constexpr int stage_bytes(KernelRole role, CellKind cell, MathKind math, const TileShape& tile) {
  return stage_bytes(role, weight_groups(role, cell), math, tile);
}

// Partial sums: [team][batch][slots * units + padding].
constexpr int kSumPadding = 4;
constexpr int sum_pitch(int slots, const TileShape& tile) { return slots * tile.units + kSumPadding; }
constexpr int sum_pitch(KernelRole role, CellKind cell, const TileShape& tile) {
  return sum_pitch(accumulator_slots(role, cell), tile);
}
constexpr int sum_bytes(int slots, MathKind math, const TileShape& tile) {
  return tile.teams * tile.batch * sum_pitch(slots, tile) * accumulator_bytes(math);
}

// What a block notes of one batch row at one step, in shared memory.
struct RowInfo {
  const void* source[2];  // the row of the state that each phase multiplies; null: zeros. kForwardModified: the second is
                          // the row of factors of the first, or null
  int64_t row;            // row in memory, of this step
  int64_t other;          // row of the previous active step
  int flags;
  int padding;
};
constexpr int table_bytes(const TileShape& tile) {
  return (tile.batch * static_cast<int>(sizeof(RowInfo)) + 127) / 128 * 128;
}

// Dynamic shared memory of a block: the table of rows, then the rings of all teams. After the product the partial sums take
// the place of the rings.
constexpr int smem_bytes(KernelRole role, int groups, int slots, MathKind math, const TileShape& tile, int stages) {
  const int ring = tile.teams * stages * stage_bytes(role, groups, math, tile), sums = sum_bytes(slots, math, tile);
  return table_bytes(tile) + (ring > sums ? ring : sums);
}
constexpr int smem_bytes(KernelRole role, CellKind cell, MathKind math, const TileShape& tile, int stages) {
  return smem_bytes(role, weight_groups(role, cell), accumulator_slots(role, cell), math, tile, stages);
}

}  // namespace fused_rnn::cuda
