// Host side of family `block`: one launch per layer.
#include <launch.cuh>
#include <stdexcept>

#include "core/ceil_div.h"
#include "cuda/block/block_sequence.h"
#include "cuda/family.h"
#include "cuda/persistent/sequence_math.h"

namespace fused_rnn::cuda {
namespace {

// arguments: a ForwardSequence or a BackwardSequence whose `l` is made here.
template <class Arguments>
void launch_blocks(void (*kernel)(Arguments), const char* name, Arguments arguments, const PersistentPlan& p,
                   const StepRange& range, void* stream) {
  arguments.l = {1, p.groups, 1, 0, 0, range.first, range.end - range.first, range.carry, nullptr};
  simt::prepare(kernel, name, p.smem_bytes);
  simt::launch(kernel, {name, p.groups * p.directions, 1, 1, p.threads, p.smem_bytes, 1, false, false}, stream, arguments);
}

// Lanes write two neighbouring elements at once.
void check_pairs(const char* name, const void* memory, DType dtype) {
  const auto size = static_cast<uintptr_t>(2 * dtype_size(dtype));
  if (reinterpret_cast<uintptr_t>(memory) % size) {
    throw std::invalid_argument(std::string(name) + ": family block takes memory that is aligned to two elements");
  }
}

}  // namespace

void block_forward(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const PersistentPlan& p = *plan.persistent;
  check_pairs("y", params.y, params.dtype);
  check_pairs("gates", params.gates, params.dtype);
  check_pairs("cs", params.cs, params.dtype);
  const ForwardSequenceKernel kernel =
      dispatch_sequence_math(plan, [&](auto math) { return BlockKernels<decltype(math)::value>::forward(params.cell); });
  launch_blocks(kernel, "block_forward", ForwardSequence{params, {}}, p, range, stream);
}

void block_backward(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream) {
  const PersistentPlan& p = *plan.persistent;
  check_pairs("d_gates", params.d_gates, params.dtype);
  check_pairs("gates", params.gates, params.dtype);
  check_pairs("cs", params.cs, params.dtype);
  const BackwardSequenceKernel kernel =
      dispatch_sequence_math(plan, [&](auto math) { return BlockKernels<decltype(math)::value>::backward(params.cell); });
  launch_blocks(kernel, "block_backward", BackwardSequence{params, {}}, p, range, stream);
}

}  // namespace fused_rnn::cuda
