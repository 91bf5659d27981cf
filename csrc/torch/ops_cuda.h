// What the files with CUDA ops share.
#pragma once
#include <ATen/Context.h>

#include <optional>

#include "plan/plan.h"
#include "torch/layer.h"

namespace fused_rnn {

// torch's own switch for recurrent layers in fp32 (torch.backends.cudnn.rnn.fp32_precision, formerly allow_tf32).
bool allows_tf32(const Tensor& x);

// Matrix products around the recurrence use TF32 where the recurrence may (tf32_cuda.h), and only there: torch's own, whose
// switch may allow TF32 elsewhere, are held to float inside of this block.
struct MatmulPrecision {
  std::optional<at::NoTF32Guard> strict;
  explicit MatmulPrecision(bool allow_tf32) {
    if (!allow_tf32) strict.emplace();
  }
};

// x W_ih^T + b_ih of direction d in rows [first, end) of memory, into the first G slots of made.gates; x: [N, I].
void project_rows(const Call& call, const ForwardCall& made, const Tensor& x, int64_t d, int64_t first, int64_t end);

// The memory that a plan asks for.
Tensor workspace_of(const Plan& plan, const Tensor& x);

}  // namespace fused_rnn
