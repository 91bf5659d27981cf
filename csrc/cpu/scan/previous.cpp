#include "cpu/scan/previous.h"

#include <cstring>

#include "cpu/isa/blocks.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kBytesOfThread = 256 * 1024;  // a thread with fewer is not worth its start

void rows_of_step(const PreviousParams& p, int64_t t) {
  const Sequence& s = p.seq;
  const int64_t end = s.offsets ? s.offsets[t + 1] - s.offsets[t] : s.B;
  for (int64_t b = 0; b < end; ++b) {
    void* const out = static_cast<char*>(p.out) + row_of(s, t, b) * p.row_bytes;
    if (const void* const from = previous_row(p, t, b)) {
      std::memcpy(out, from, p.row_bytes);
    } else {
      std::memset(out, 0, p.row_bytes);
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
