// How deep the ring of a step kernel's product is.
#pragma once
#include <algorithm>

#include "core/ceil_div.h"
#include "plan/machine.h"
#include "plan/step_geometry.h"

namespace fused_rnn {

// Enough stages to hide the latency of L2 without keeping a second block from the SM; with overlapped launches as many as
// the product has chunks, since those are loaded while the preceding step still runs. 0: not even the fewest fit.
// bytes(stages): shared memory of a block.
template <class F>
int choose_stages(const DeviceInfo& device, const cuda::TileShape& tile, int64_t chunks, F&& bytes) {
  if (bytes(cuda::kMinStages) > device.smem_per_block) return 0;
  const int64_t per_team = ceil_div(chunks, tile.teams);
  const int most = device.compiled_for >= 90 ? cuda::kMaxStages : device.compiled_for >= 80 ? 4 : 2;
  const int wanted = static_cast<int>(std::clamp<int64_t>(per_team + 1, cuda::kMinStages, most));
  const int two_blocks = std::min(device.smem_per_block, device.smem_per_sm / 2 - kReservedSmem);
  int stages = cuda::kMinStages;
  while (stages < wanted && bytes(stages + 1) <= two_blocks) ++stages;
  if (stages == 2 && wanted > 2 && bytes(3) <= device.smem_per_block) stages = 3;
  return stages;
}

}  // namespace fused_rnn
