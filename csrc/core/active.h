// Which rows of a batch of sequences take part in a step, and where they lie. Letters: params.h.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fused_rnn {

// At most one of lengths and offsets is given.
//   dense:            row (t, b) is t * B + b, always active
//   dense + lengths:  the same place, active while t < lengths[b] (any order, 0 allowed); y is 0 at inactive rows
//   packed (offsets): row (t, b) is offsets[t] + b, active while b < offsets[t + 1] - offsets[t] (never growing with t)
struct Sequence {
  int64_t T, B, N;
  const int64_t* lengths;  // [B] or null
  const int64_t* offsets;  // [T + 1] or null
};

FUSED_RNN_HD bool is_active(const Sequence& s, int64_t t, int64_t b) {
  if (t < 0 || t >= s.T) return false;
  if (s.lengths) return t < s.lengths[b];
  if (s.offsets) return b < s.offsets[t + 1] - s.offsets[t];
  return true;
}

// Of row b, which is active at t = 0 .. n - 1: n, from 0 to T. Index: an integer type that holds T.
template <class Index = int64_t>
FUSED_RNN_HD Index active_steps(const Sequence& s, int64_t b) {
  const Index T = static_cast<Index>(s.T);
  if (s.lengths) {
    const int64_t length = s.lengths[b];
    return length < 0 ? 0 : length < T ? static_cast<Index>(length) : T;
  }
  if (!s.offsets) return T;
  Index low = 0, high = T;  // of the first step at which the row is not active
  while (low < high) {
    const Index middle = low + (high - low) / 2;
    if (b < s.offsets[middle + 1] - s.offsets[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

FUSED_RNN_HD int64_t row_of(const Sequence& s, int64_t t, int64_t b) { return s.offsets ? s.offsets[t] + b : t * s.B + b; }

}  // namespace fused_rnn
