#include "cpu/scan/previous.h"

#include <cstring>

#include "cpu/plan.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kBytesOfThread = 256 * 1024;  // less does not pay for another thread

void rows_of_step(const PreviousParams& p, int64_t t) {
  const Sequence& s = p.seq;
  const char *y = static_cast<const char*>(p.y), *h0 = static_cast<const char*>(p.h0);
  const int64_t before = p.reverse ? t + 1 : t - 1, end = s.offsets ? s.offsets[t + 1] - s.offsets[t] : s.B;
  for (int64_t b = 0; b < end; ++b) {
    const int64_t row = row_of(s, t, b);
    char* out = static_cast<char*>(p.out) + row * p.row_bytes;
    const char* from = h0 ? h0 + b * p.row_bytes : nullptr;
    if (is_active(s, before, b)) from = y + row_of(s, before, b) * p.y_stride;
    if (!from || is_reset(p.modifier, row) || !is_active(s, t, b)) {
      std::memset(out, 0, p.row_bytes);
    } else {
      std::memcpy(out, from, p.row_bytes);
    }
  }
}

}  // namespace

void previous_rows(const PreviousParams& p) {
  const auto run = [&](int threads) {
    return run_threads(threads, [&](int thread) {
      for (int64_t t = share_begin(p.seq.T, threads, thread); t < share_begin(p.seq.T, threads, thread + 1); ++t) {
        rows_of_step(p, t);
      }
    });
  };
  const int64_t most = p.seq.N * p.row_bytes / kBytesOfThread;
  const int threads = most > 1 && thread_limit() > most ? static_cast<int>(most) : most > 1 ? thread_limit() : 1;
  if (!run(threads)) run(1);
}

}  // namespace fused_rnn::cpu
