// Host side of the families `grid` and `cluster`: one launch per layer, or several where the device does not hold all groups
// at once.
#include <algorithm>
#include <launch.cuh>
#include <simt.cuh>

#include "core/ceil_div.h"
#include "cuda/family.h"
#include "cuda/persistent/sequence.h"
#include "cuda/persistent/sequence_math.h"

namespace fused_rnn::cuda {
namespace {

// One thread a piece of 16 bytes.
__global__ void __launch_bounds__(kPersistentThreads) zero_fill_kernel(const ZeroFill fill) {
  const int64_t piece = static_cast<int64_t>(simt::block_x()) * kPersistentThreads + simt::thread_x();
  if (piece < fill.pieces) simt::store_vec(static_cast<uint32_t*>(fill.memory) + 4 * piece, simt::Vec<uint32_t, 4>{});
}

// Every word of an exchange carries the number of its step. What an earlier launch left must not look like such a word.
void zero_exchange(void* memory, int64_t bytes, void* stream) {
  const ZeroFill fill{memory, bytes / 16};
  const int64_t blocks = ceil_div(fill.pieces, kPersistentThreads);
  simt::launch(zero_fill_kernel, {"zero_fill", static_cast<int>(blocks), 1, 1, kPersistentThreads, 0, 1, false, false},
               stream, fill);
}

// All launches of a layer; arguments: a ForwardSequence or a BackwardSequence whose `l` is made here.
template <class Arguments>
void launch_all(void (*kernel)(Arguments), const char* name, Arguments arguments, const Plan& plan, const StepRange& range,
                void* stream) {
  const PersistentPlan& p = *plan.persistent;
  const int64_t B = arguments.p.seq.B, rows_per_group = int64_t{p.row_tiles} * kTileRows;
  simt::prepare(kernel, name, p.smem_bytes);
  if (p.cluster && p.slices > 8) simt::allow_large_clusters(kernel, name);
  for (int dir = 0; dir < arguments.p.D; dir += p.directions) {
    for (int64_t row = 0; row < B; row += p.groups * rows_per_group) {
      const int64_t groups = std::min<int64_t>(p.groups, ceil_div(B - row, rows_per_group));
      arguments.l = {p.slices,
                     static_cast<int>(groups),
                     p.row_tiles,
                     dir,
                     row,
                     range.first,
                     range.end - range.first,
                     range.carry,
                     p.cluster ? nullptr : arguments.p.workspace};
      const auto blocks = static_cast<int>(groups * p.directions * p.slices);
      if (!p.cluster) zero_exchange(arguments.p.workspace, plan.workspace_bytes, stream);
      const simt::LaunchConfig config{name,  blocks,    1, 1, kPersistentThreads, p.smem_bytes, p.cluster ? p.slices : 1,
                                      false, !p.cluster};
      simt::launch(kernel, config, stream, arguments);
    }
  }
}

}  // namespace

void grid_forward(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const ForwardSequenceKernel kernel =
      dispatch_sequence_math(plan, [&](auto math) { return GridKernels<decltype(math)::value>::forward(params.cell); });
  launch_all(kernel, "grid_forward", ForwardSequence{params, {}}, plan, range, stream);
}

void grid_backward(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const BackwardSequenceKernel kernel =
      dispatch_sequence_math(plan, [&](auto math) { return GridKernels<decltype(math)::value>::backward(params.cell); });
  launch_all(kernel, "grid_backward", BackwardSequence{params, {}}, plan, range, stream);
}

void cluster_forward(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const ForwardSequenceKernel kernel = dispatch_sequence_math(plan, [&](auto math) {
    return ClusterKernels<decltype(math)::value>::forward(params.cell, plan.persistent->unit_tiles);
  });
  launch_all(kernel, "cluster_forward", ForwardSequence{params, {}}, plan, range, stream);
}

void cluster_backward(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const BackwardSequenceKernel kernel = dispatch_sequence_math(plan, [&](auto math) {
    return ClusterKernels<decltype(math)::value>::backward(params.cell, plan.persistent->unit_tiles);
  });
  launch_all(kernel, "cluster_backward", BackwardSequence{params, {}}, plan, range, stream);
}

}  // namespace fused_rnn::cuda
