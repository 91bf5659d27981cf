#pragma once
#include <algorithm>
#include <atomic>

namespace fused_rnn::cpu {

// Lowers the number of threads for a while when another process holds one of the cores. The threads of a team then wait at
// every step for the thread that shares this core, up to a time slice each time, and fewer threads are faster.
//   - The sign is the time that some thread of a region had no core. More than half of the region's time, twice in a row or
//     once for long, halves the limit for kWhile.
//   - Where a call on one thread lacks its core too, other processes hold all cores, and more threads get a larger share of
//     them: the limit is lifted at once, and not lowered again for ten times as long.
// All times are seconds; `now` is the caller's clock.
class Crowd {
 public:
  int limit(int threads, double now) {
    const double until = until_.load(std::memory_order_relaxed);
    if (until == 0) return threads;
    if (now < until) return std::max(1, std::min(threads, limit_.load(std::memory_order_relaxed)));
    until_.store(0, std::memory_order_relaxed);
    return threads;
  }
  bool limits() const { return until_.load(std::memory_order_relaxed) != 0; }
  // A region of so many threads took `seconds`; the thread that lacked a core for longest did so for `lacked` seconds.
  void report(int threads, double seconds, double lacked, double now) {
    if (lacked < std::max(seconds * (threads == 1 ? 0.2 : 0.55), kSlice)) {
      in_a_row_.store(0, std::memory_order_relaxed);
      return;
    }
    if (in_a_row_.fetch_add(1, std::memory_order_relaxed) + 1 < 2 && lacked < kLong) return;
    in_a_row_.store(0, std::memory_order_relaxed);
    if (threads == 1) {
      until_.store(0, std::memory_order_relaxed);
      ignore_until_.store(now + 10 * kWhile, std::memory_order_relaxed);
    } else if (now > ignore_until_.load(std::memory_order_relaxed)) {
      limit_.store(threads / 2, std::memory_order_relaxed);
      until_.store(now + kWhile, std::memory_order_relaxed);
    }
  }

 private:
  static constexpr double kSlice = 0.001, kLong = 0.02, kWhile = 0.2;
  std::atomic<double> until_{0}, ignore_until_{0};
  std::atomic<int> limit_{0}, in_a_row_{0};
};

}  // namespace fused_rnn::cpu
