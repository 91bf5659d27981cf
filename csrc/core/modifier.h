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

// Zoneout of a state: it stays what it was, or becomes share * before + (1 - share) * after.
struct Zoneout {
  const bool* keep;  // [D, N, H]: where true the unit keeps its value; or null
  double share;      // without keep; 0: no zoneout
};

struct Modifier {
  const bool* resets;  // [N] or null; true: h and c are replaced before this row's step, in the order of the scan
  ResetState h, c;     // by [P] and [H]; null without resets
  // Zoneout comes after the step; h of an LSTM is made of its c before zoneout.
  Zoneout zoneout_h, zoneout_c;
  double clip;            // the new c, or the new h of a cell without c, is cut to [-clip, clip]; 0: it is not
  const void* product;    // [D, B, P] in the layer's dtype or null: factors of the h that is multiplied with W_hh
  const void* candidate;  // [D, B, H] in the layer's dtype or null: factors of the candidate (LSTM's g, GRU's n)
};

FUSED_RNN_HD bool is_zoneout(const Zoneout& z) { return z.keep || z.share != 0; }

// Whether options change steps; resets do not count. A cell without saved slots then saves one.
FUSED_RNN_HD bool modifies_steps(const Modifier& m) {
  return is_zoneout(m.zoneout_h) || is_zoneout(m.zoneout_c) || m.clip != 0 || m.product || m.candidate;
}

// Whether resets put anything but zeros.
FUSED_RNN_HD bool puts_states(const Modifier& m) { return m.h.data || m.c.data; }

FUSED_RNN_HD bool is_reset(const Modifier& m, int64_t row) { return m.resets && m.resets[row]; }

// What a state is at a reset of batch row b before step t of a direction; null: zeros.
FUSED_RNN_HD const void* reset_row(const ResetState& s, int64_t t, int direction, int64_t b) {
  return s.data ? static_cast<const char*>(s.data) + t * s.step + direction * s.direction + b * s.row : nullptr;
}

}  // namespace fused_rnn
