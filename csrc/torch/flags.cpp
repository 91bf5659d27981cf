// The op flags: random bools on a CPU, for zoneout. They follow from a seed, a number that torch's generator has drawn, so
// that the op is a function of its arguments to everything that looks on. Its fake kernel is in fused_rnn/_ops.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/isa/kernels.h"
#include "torch/tensors.h"

namespace fused_rnn {
namespace {

// like: of the shape of the flags; its values are not read.
Tensor flags_cpu(const Tensor& seed, const Tensor& like, double probability) {
  TORCH_CHECK_VALUE(seed.dim() == 0 && seed.scalar_type() == at::kLong, "seed: expected int64 without dimensions, got ",
                    seed.scalar_type(), " of shape ", seed.sizes());
  TORCH_CHECK_VALUE(probability >= 0 && probability <= 1, "probability: expected 0 to 1, got ", probability);
  Tensor flags = at::empty(like.sizes(), like.options().dtype(at::kBool));
  const double bound = std::round(std::ldexp(probability, 32));
  if (bound > UINT32_MAX) return flags.fill_(true);
  cpu::selected_kernels().f32.flags({static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), static_cast<uint32_t>(bound),
                                     flags.numel(), flags.data_ptr<bool>()});
  return flags;
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) { m.def("flags(Tensor seed, Tensor like, float probability) -> Tensor"); }

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) { m.impl("flags", fused_rnn::flags_cpu); }
