// What happens to the state of a row beside the cell, at one of its steps.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fused_rnn {

struct Modifier {
  const bool* resets;  // [N] or null; true: h and c are zero before this row's step, in the order of the scan
};

FUSED_RNN_HD bool is_reset(const Modifier& m, int64_t row) { return m.resets && m.resets[row]; }

}  // namespace fused_rnn
