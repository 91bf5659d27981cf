#include <algorithm>
#include <launch.cuh>
#include <simt.cuh>
#include <stdexcept>
#include <string>

#include "cuda/persistent/persistent_launch.h"
#include "cuda/persistent/sequence.h"

namespace fused_rnn::cuda {
namespace {

// One thread a piece of 16 bytes.
__global__ void __launch_bounds__(kPersistentThreads) zero_fill_kernel(const ZeroFill fill) {
  const int64_t piece = static_cast<int64_t>(simt::block_x()) * kPersistentThreads + simt::thread_x();
  if (piece < fill.pieces) simt::store_vec(static_cast<uint32_t*>(fill.memory) + 4 * piece, simt::Vec<uint32_t, 4>{});
}

// The words of the exchange carry the number of their step, which no earlier contents may resemble.
void zero_exchange(void* memory, int64_t bytes, void* stream) {
  const ZeroFill fill{memory, bytes / 16};
  const int64_t blocks = (fill.pieces + kPersistentThreads - 1) / kPersistentThreads;
  simt::launch(zero_fill_kernel, {"zero_fill", static_cast<int>(blocks), 1, 1, kPersistentThreads, 0, 1, false, false},
               stream, fill);
}

template <class F>
auto dispatch_math(MathKind math, F&& f) {
  switch (math) {
    case MathKind::kFp32: return f(std::integral_constant<MathKind, MathKind::kFp32>{});
    case MathKind::kTf32: return f(std::integral_constant<MathKind, MathKind::kTf32>{});
    case MathKind::kFp16: return f(std::integral_constant<MathKind, MathKind::kFp16>{});
    case MathKind::kBf16: return f(std::integral_constant<MathKind, MathKind::kBf16>{});
    default: throw std::invalid_argument("the persistent families have no kernels of this arithmetic");
  }
}

// All launches of a layer; Arguments is ForwardSequence or BackwardSequence.
template <class Arguments>
void launch_all(void (*kernel)(Arguments), const char* name, Arguments& arguments, const Plan& plan, const StepRange& range,
                void* stream) {
  const PersistentPlan& p = *plan.persistent;
  const bool cluster = plan.family == Family::kCluster;
  const int64_t B = arguments.p.seq.B, rows_per_group = int64_t{p.tiles} * kTileRows;
  simt::prepare(kernel, name, p.smem_bytes);
  if (cluster && p.slices > 8) simt::allow_large_clusters(kernel, name);
  for (int dir = 0; dir < arguments.p.D; dir += p.directions) {
    for (int64_t row = 0; row < B; row += p.groups * rows_per_group) {
      const int64_t groups = std::min<int64_t>(p.groups, (B - row + rows_per_group - 1) / rows_per_group);
      arguments.l = {p.slices,
                     static_cast<int>(groups),
                     p.tiles,
                     dir,
                     row,
                     range.first,
                     range.end - range.first,
                     range.carry,
                     cluster ? nullptr : arguments.p.workspace};
      const int64_t blocks = groups * p.directions * p.slices;
      if (!cluster) zero_exchange(arguments.p.workspace, plan.workspace_bytes, stream);
      simt::launch(
          kernel,
          {name, static_cast<int>(blocks), 1, 1, kPersistentThreads, p.smem_bytes, cluster ? p.slices : 1, false, !cluster},
          stream, arguments);
    }
  }
}

}  // namespace

void persistent_forward(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  ForwardSequence arguments{params, {}};
  const PersistentPlan& p = *plan.persistent;
  const bool cluster = plan.family == Family::kCluster;
  const ForwardSequenceKernel kernel = dispatch_math(p.math, [&](auto math) {
    constexpr MathKind kMath = decltype(math)::value;
    return cluster ? ClusterKernels<kMath>::forward(params.cell, p.unit_tiles) : GridKernels<kMath>::forward(params.cell);
  });
  launch_all(kernel, cluster ? "cluster_forward" : "grid_forward", arguments, plan, range, stream);
}

void persistent_backward(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  BackwardSequence arguments{params, {}};
  const PersistentPlan& p = *plan.persistent;
  const bool cluster = plan.family == Family::kCluster;
  const BackwardSequenceKernel kernel = dispatch_math(p.math, [&](auto math) {
    constexpr MathKind kMath = decltype(math)::value;
    return cluster ? ClusterKernels<kMath>::backward(params.cell, p.unit_tiles) : GridKernels<kMath>::backward(params.cell);
  });
  launch_all(kernel, cluster ? "cluster_backward" : "grid_backward", arguments, plan, range, stream);
}

}  // namespace fused_rnn::cuda
