// The planner of family `gemm`.
#include "plan/gemm.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "core/ceil_div.h"
#include "plan/machine.h"

namespace fused_rnn {

using cuda::KernelRole;
using cuda::MathKind;
using cuda::TileShape;

namespace {

int64_t accumulator_size(const Problem& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }

// A product of one step, of every direction: [B, inputs] by a weight matrix.
struct StepGemm {
  int64_t inputs, columns;
};

// Microseconds of the multiply-adds at the step kernels' rate, in blocks of kTileRows x kTileColumns. Where these are too
// few for all SMs, their sums are divided.
double tiles_us(const Problem& p, const DeviceInfo& device, const StepGemm& gemm) {
  constexpr int64_t kTileRows = 64, kTileColumns = 128, kLeastInputs = 256;  // the latter of a part of a sum
  const int64_t tiles = ceil_div(p.B, kTileRows) * ceil_div(gemm.columns, kTileColumns);
  const int64_t parts = std::clamp<int64_t>(device.sm_count / tiles, 1, std::max<int64_t>(1, gemm.inputs / kLeastInputs));
  const double of_block = double(kTileRows * kTileColumns) * double(ceil_div(gemm.inputs, parts));
  return double(ceil_div(tiles * parts, device.sm_count)) * of_block /
         (math_rate(math_of(p, device), device) * kClockGhz * 1e3);
}

// Microseconds of it. The library's launches do not overlap with ours.
double gemm_us(const Problem& p, const DeviceInfo& device, const StepGemm& gemm) {
  const MathKind math = math_of(p, device);
  const double rows = double(p.B), inputs = double(gemm.inputs), columns = double(gemm.columns);
  const double weights = inputs * columns * dtype_size(p.dtype);
  // Sums are wider than what matrix_product_us takes the result to be.
  const double wider = rows * columns * double(accumulator_size(p) - dtype_size(p.dtype));
  const double wider_us = wider / (kSharedL2BytesPerClock * device.sm_count * kClockGhz * 1e3);
  const double us = std::max(matrix_product_us(math, rows, inputs, columns, device) + wider_us, tiles_us(p, device, gemm));
  return std::max(p.D * (kLaunchUs + us), dram_us(p.D * weights, device));
}

// What a pointwise kernel moves for one element, in bytes.
struct ElementBytes {
  double streamed;  // of tensors with a row for every step, which L2 keeps for no other step
  double kept;      // of sums and states, which the next launch reads
};

ElementBytes bytes_of(const Problem& p, KernelRole role) {
  const CellTraits cell = traits_of(p.cell);
  const double size = double(dtype_size(p.dtype)), wide = double(accumulator_size(p));
  const int saved = p.modified ? cell.slots : cell.saved;
  const double carries = cell.has_c || (cell.reads_h && p.backward) ? 2 * wide : 0;  // read and written
  switch (role) {
    case KernelRole::kForward:
    case KernelRole::kForwardModified: {
      const double written = p.training ? saved + cell.has_c : 0;
      return {size * (cell.gates + written + 1), wide * cell.gates + carries + (cell.reads_h ? size : 0)};
    }
    case KernelRole::kProject: return {size, wide};
    case KernelRole::kBackward:
    case KernelRole::kBackwardModified:  // gates, c twice, y or h before, dy; d_gates
      return {size * (saved + 2 * cell.has_c + !cell.has_c + 1 + cell.slots), wide + carries};
    case KernelRole::kStateGrad: return {2 * size, wide};
    case KernelRole::kForwardInput:
    case KernelRole::kTangents:
    case KernelRole::kProjectTangents:
    case KernelRole::kDualBackward:
    case KernelRole::kDualStateGrad: break;  // of other families
  }
  return {};
}

double pointwise_us(const Problem& p, const DeviceInfo& device, KernelRole role, int64_t units) {
  const ElementBytes bytes = bytes_of(p, role);
  const double elements = double(p.D) * double(p.B) * double(units), kept = elements * bytes.kept;
  const double l2_us =
      elements * (bytes.streamed + bytes.kept) / (kSharedL2BytesPerClock * device.sm_count * kClockGhz * 1e3);
  const double dram = device.dram_gb_per_s > 0 ? elements * bytes.streamed / (device.dram_gb_per_s * 1e3) : 0;
  return kLaunchUs + kBlockUs + std::max(l2_us, dram + dram_us(kept, device));
}

KernelPlan plan_pointwise(const Problem& p, const DeviceInfo& device, KernelRole role, int64_t units) {
  KernelPlan plan{};
  plan.role = role;
  plan.tile = cuda::TileSize::kPointwise;
  plan.math = math_of(p, device);
  const TileShape tile = cuda::tile_shape(role, plan.math, plan.tile);
  plan.grid_x = ceil_div(p.B, tile.batch);
  plan.grid_y = ceil_div(units, tile.units);
  plan.grid_z = p.D;
  plan.threads = cuda::tile_threads(tile);
  plan.smem_bytes = cuda::table_bytes(tile);
  plan.us = pointwise_us(p, device, role, units);
  if (plan.grid_x > 0x7fffffff || plan.grid_y > 0xffff) {
    throw std::invalid_argument(std::string(to_string(role)) + ": the grid exceeds what CUDA can launch");
  }
  return plan;
}

}  // namespace

std::string gemm_obstacle(const Problem& problem, const DeviceInfo& device) {
  if (problem.dual) return kNoDualKernels;
  if (problem.dtype == DType::kBFloat16 && device.compute_capability < 80) {
    return "has no products of bfloat16 below compute capability 8.0";
  }
  return "";
}

void plan_gemm(const Problem& p, const DeviceInfo& device, Plan& plan) {
  const bool projected = p.P != p.H;
  const int64_t gates = gate_count(p.cell) * p.H;
  plan.workspace_bytes = gemm_workspace(p).bytes;
  double products_us = 0, pointwise = 0;
  const auto product = [&](const StepGemm& gemm) {
    plan.products += p.D;
    products_us += gemm_us(p, device, gemm);
  };
  const auto kernel = [&](KernelRole role, int64_t units, bool every_step) {
    plan.kernels.push_back(plan_pointwise(p, device, role, units));
    if (every_step) pointwise += plan.kernels.back().us;
  };
  if (p.backward) {
    product({gates, p.P});
    kernel(KernelRole::kStateGrad, p.P, projected);  // without a projection once, for h0
    if (projected) product({p.P, p.H});
    kernel(cuda::backward_role(p.modified), p.H, true);
  } else {
    product({p.P, gates});
    kernel(cuda::forward_role(false, p.modified), p.H, true);
    if (projected) product({p.H, p.P});
    if (projected) kernel(KernelRole::kProject, p.P, true);
  }
  plan.us_per_step = products_us + pointwise;
  char text[160];
  std::snprintf(text, sizeof text, "a step is %d product%s by cuBLAS, %.1f us, and pointwise kernels, %.1f us",
                plan.products, plan.products > 1 ? "s" : "", products_us, pointwise);
  plan.reason = text;
}

GemmWorkspace gemm_workspace(const Problem& p) {
  const auto aligned = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  const int64_t rows = p.D * p.B, gates = gate_count(p.cell) * p.H, size = dtype_size(p.dtype);
  GemmWorkspace layout{};
  layout.step = workspace_layout(p);
  layout.sums = layout.step.bytes;
  layout.rows = layout.sums + aligned(rows * (p.backward ? p.H : gates) * accumulator_size(p));
  const bool apart = p.ragged || (p.modified && !p.backward);
  layout.d_h = layout.rows + (apart ? aligned(rows * (p.backward ? gates : p.P) * size) : 0);
  layout.bytes = layout.d_h + (apart && p.backward && p.P != p.H ? aligned(rows * p.P * size) : 0);
  return layout;
}

}  // namespace fused_rnn
