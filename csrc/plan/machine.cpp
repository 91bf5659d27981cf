#include "plan/machine.h"

#include <algorithm>
#include <tuple>

#include "plan/persistent_geometry.h"

namespace fused_rnn {

using cuda::MathKind;

std::string capability_text(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

double math_rate(MathKind math, const DeviceInfo& device) {
  const int capability = device.compute_capability;
  const bool server = capability == 80 || capability == 90 || capability == 100;
  switch (math) {
    case MathKind::kFp64: return server ? 32 : 2;
    case MathKind::kFp32: return capability == 75 || capability == 80 ? 64 : 128;
    case MathKind::kTf32: return server ? 512 : 256;
    case MathKind::kFp16: return server ? 1024 : 512;
    case MathKind::kBf16:
      if (device.compiled_for < 80) return 32;  // plain multiply-adds with conversions
      return server ? 1024 : 512;
  }
  return 0;
}

// mma.sync reaches the peak of an A100's tensor cores and 63% of a Hopper's.
double persistent_math_rate(MathKind math, const DeviceInfo& device) {
  const int capability = device.compute_capability;
  const double half = capability == 80 ? 1024 : capability == 90 || capability == 100 ? 1290 : 512;
  switch (math) {
    case MathKind::kFp64:
    case MathKind::kFp32: return math_rate(math, device);
    case MathKind::kTf32: return half / 2;
    case MathKind::kFp16:
    case MathKind::kBf16: return half;
  }
  return 0;
}

double peak_math_rate(MathKind math) {
  switch (math) {
    case MathKind::kFp64: return 64;
    case MathKind::kFp32: return 128;
    case MathKind::kTf32: return 1024;
    case MathKind::kFp16:
    case MathKind::kBf16: return 2048;
  }
  return 0;
}

double matrix_product_us(MathKind math, double rows, double inputs, double columns, const DeviceInfo& device) {
  const double bytes = (rows * (columns + inputs) + columns * inputs) * cuda::storage_bytes(math);
  const double math_us = rows * columns * inputs / (math_rate(math, device) * device.sm_count * kClockGhz * 1e3);
  const double l2_us = bytes / (kSharedL2BytesPerClock * device.sm_count * kClockGhz * 1e3);
  return std::max(math_us, l2_us);
}

double dram_us(double bytes, const DeviceInfo& device) {
  if (device.dram_gb_per_s <= 0 || bytes <= double(device.l2_bytes)) return 0;
  return bytes / (device.dram_gb_per_s * 1e3);
}

// Clusters do not span the device's groups of SMs, of which some are incomplete: 7 clusters of 16 blocks fit an H100, 15 of
// 8.
int64_t clusters_at_once(const DeviceInfo& device, int64_t blocks) {
  if (blocks > std::min(device.max_cluster, cuda::kMaxClusterBlocks)) return 0;
  if (device.active_clusters[1] > 0) return device.active_clusters[blocks];
  const int64_t all = device.sm_count / blocks;
  return blocks >= 8 && all > 1 ? all - 1 : all;
}
static_assert(std::tuple_size<decltype(DeviceInfo::active_clusters)>::value == cuda::kMaxClusterBlocks + 1);

}  // namespace fused_rnn
