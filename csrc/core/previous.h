// The h before each step, which the gradient of the recurrent weights multiplies d_gates with: the rule for one row, shared
// by the CPU's loop (cpu/scan/previous.cpp) and the CUDA kernel (cuda/previous_rows.cu).
#pragma once
#include "core/active.h"
#include "core/modifier.h"

namespace fused_rnn {

// One direction of a layer.
struct PreviousParams {
  Sequence seq;
  Modifier modifier;
  bool reverse;  // direction 1
  int64_t row_bytes;
  const void* y;  // [N], y_stride bytes from row to row
  int64_t y_stride;
  const void* h0;  // [B] or null (zeros)
  void* out;       // [N]
};

// The h of batch row b before its step at time t, row_bytes long: the y of the step before, h0, or what a reset puts there.
// Null stands for zeros: at a reset to zeros, where h0 is null, and where the row takes no part in the step.
FUSED_RNN_HD const void* previous_row(const PreviousParams& p, int64_t t, int64_t b) {
  if (!is_active(p.seq, t, b)) return nullptr;
  if (is_reset(p.modifier, row_of(p.seq, t, b))) return reset_row(p.modifier.h, t, p.reverse, b);
  const int64_t before = p.reverse ? t + 1 : t - 1;
  if (is_active(p.seq, before, b)) return static_cast<const char*>(p.y) + row_of(p.seq, before, b) * p.y_stride;
  return p.h0 ? static_cast<const char*>(p.h0) + b * p.row_bytes : nullptr;
}

}  // namespace fused_rnn
