// What the gradient of the recurrent weights multiplies d_gates with.
#pragma once
#include "core/params.h"

namespace fused_rnn::cpu {

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

// Every row's h before its step: the y of the step before, or h0; zeros at a reset and at inactive rows.
void previous_rows(const PreviousParams& p);

}  // namespace fused_rnn::cpu
