// What happens to the state of a row beside the cell, at one of its steps.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fused_rnn {

// One state that steps begin from at resets, in the layer's dtype. Strides are bytes from a step, a direction and a batch
// row to the next; 0 where all share one.
struct ResetState {
  const void* data;  // or null (zeros)
  int64_t step, direction, row;
};

struct Modifier {
  const bool* resets;  // [N] or null; true: h and c are replaced before this row's step, in the order of the scan
  ResetState h, c;     // by [P] and [H]; null without resets
};

FUSED_RNN_HD bool is_reset(const Modifier& m, int64_t row) { return m.resets && m.resets[row]; }

// What a state is at a reset of batch row b before step t of a direction; null: zeros.
FUSED_RNN_HD const void* reset_row(const ResetState& s, int64_t t, int direction, int64_t b) {
  return s.data ? static_cast<const char*>(s.data) + t * s.step + direction * s.direction + b * s.row : nullptr;
}

}  // namespace fused_rnn
