// What a product of the step kernels takes, by the cost model of machine.h.
#pragma once
#include <algorithm>

#include "core/ceil_div.h"
#include "plan/machine.h"
#include "plan/step_geometry.h"

namespace fused_rnn {

// Of each of `blocks` blocks: `groups` weight rows of each of its units, times its batch rows, over k in `chunks` chunks.
// Blocks of other batch rows read the same weights: weight_bytes counts them once.
struct StepProduct {
  cuda::MathKind math;
  cuda::TileShape tile;
  int groups;
  int64_t k, chunks, blocks;
  int stages;
  double weight_bytes;
};

// Microseconds beside launching.
inline double product_us(const StepProduct& p, const DeviceInfo& device) {
  const double rows = p.groups * p.tile.units, k = double(p.k), blocks = double(p.blocks);
  const double per_sm = double(ceil_div(p.blocks, device.sm_count));
  const double bytes = (rows + p.tile.batch) * k * cuda::storage_bytes(p.math);
  const double sm_us = per_sm * bytes / (kL2BytesPerClock * kClockGhz * 1e3);
  const double l2_us = blocks * bytes / (kSharedL2BytesPerClock * device.sm_count * kClockGhz * 1e3);
  const double math_us = per_sm * rows * p.tile.batch * k / (math_rate(p.math, device) * kClockGhz * 1e3);
  const double latency_us = double(ceil_div(p.chunks, p.tile.teams)) * kL2LatencyUs / std::max(1, p.stages - 1);
  return std::max({sm_us, l2_us, math_us, latency_us, dram_us(p.weight_bytes, device)});
}

// Microseconds of a launch of a step, beside its product.
inline double step_launch_us(const DeviceInfo& device) {
  return (device.compiled_for >= 90 ? kOverlappedLaunchUs : kLaunchUs) + kBlockUs;
}

}  // namespace fused_rnn
