// What the kernels and their planner need to know of a device. No torch, no CUDA include.
#pragma once
#include <array>
#include <cstdint>

namespace fused_rnn {

struct DeviceInfo {
  int compute_capability;  // 10 * major + minor: 75, 80, 86, 89, 90, 100, 120
  int sm_count;
  int smem_per_block;    // bytes of dynamic shared memory a block may opt in to
  int smem_per_sm;       // bytes
  int registers_per_sm;  // 32-bit
  int threads_per_sm;    // resident threads
  int64_t l2_bytes;
  int max_cluster;  // blocks in a cluster, non-portable sizes included; 1: no clusters
  // Compute capability that the code which runs on this device was compiled for. It may be older than the device: the binary
  // of an earlier minor version, or a PTX that the driver translates. 0: no code in this build runs there.
  int compiled_for;
  // [n]: clusters of n blocks that run at once, each block with an SM for itself. 0: the device runs none of that size,
  // which happens on a MIG slice and on a card with incomplete groups of SMs. [1] == 0: the device was not asked, and the
  // planner estimates.
  std::array<int, 17> active_clusters{};
  // Blocks of a persistent kernel that run at once, each with an SM for itself; -1: none. 0: the device was not asked, and
  // the planner takes sm_count.
  int resident_blocks = 0;
  int dram_gb_per_s = 0;  // of the device's memory; 0: not known, and the planner takes all weights to stay in L2
};

}  // namespace fused_rnn
