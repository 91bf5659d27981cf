#include "cpu/scan/checkpoint.h"

#include <algorithm>
#include <cstring>

namespace fused_rnn::cpu {
namespace {

// f(y, at, bytes) for each output that is kept: its row of y, null for a row that has done no step, and where it lies among
// the checkpoints, in bytes.
template <class F>
void for_checkpoints(const ForwardParams& p, int64_t every, F&& f) {
  const int64_t count = (p.seq.T - 1) / every, bytes = p.P * dtype_size(p.dtype);
  for (int d = 0; d < p.D; ++d) {
    for (int64_t b = 0; b < p.seq.B; ++b) {
      const int64_t length = active_steps(p.seq, b);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t done = steps_done(p.seq.T, length, d, (j + 1) * every);
        const int64_t place = (d * count + j) * p.seq.B + b;
        const int64_t row = done > 0 ? row_of(p.seq, time_of_last(length, d, done), b) : 0;
        f(done > 0 ? static_cast<char*>(p.y) + (row * p.D + d) * bytes : nullptr, place * bytes, bytes);
      }
    }
  }
}

}  // namespace

void take_outputs(const ForwardParams& p, int64_t every, void* checkpoints) {
  for_checkpoints(p, every, [&](const char* y, int64_t at, int64_t bytes) {
    char* const to = static_cast<char*>(checkpoints) + at;
    y ? std::memcpy(to, y, bytes) : std::memset(to, 0, bytes);
  });
}

void put_outputs(const ForwardParams& p, int64_t every, const void* checkpoints) {
  for_checkpoints(p, every, [&](char* y, int64_t at, int64_t bytes) {
    if (y) std::memcpy(y, static_cast<const char*>(checkpoints) + at, bytes);
  });
}

SavedRows rows_of_steps(const Sequence& seq, int D, int64_t first, int64_t end) {
  SavedRows rows{};
  for (int d = 0; d < D; ++d) {
    const int64_t t = d == 0 ? first : seq.T - end, t_end = d == 0 ? end : seq.T - first;
    rows.first[d] = row_of(seq, t, 0);
    rows.count = std::max(rows.count, row_of(seq, t_end, 0) - rows.first[d]);
  }
  return rows;
}

}  // namespace fused_rnn::cpu
