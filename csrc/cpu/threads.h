// Threads: one parallel region of the caller's OpenMP for a whole call, and the barrier that a team meets at.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace fused_rnn::cpu {

// The most threads that a call made here and now may use. It is omp_get_max_threads(), at most the processors of the process
// (processors.h), and fewer for a while after calls whose threads lacked cores. It is 1 inside a parallel region, without
// OpenMP, and in a forked child, whose copy of the parent's thread pool has no threads. Results do not depend on it.
int thread_limit();

// Runs work(thread) for thread = 0 .. threads - 1, all at once. Returns false, with nothing run, if OpenMP gave fewer
// threads.
bool run_threads(int threads, const std::function<void(int)>& work);

// Asks for huge pages behind a large array that is about to be written for the first time: page faults otherwise take a
// fifth of a large training forward. This is a hint: it does nothing for small arrays and on systems that do not know it.
void prefer_huge_pages(void* array, int64_t bytes);

// A waiting thread spins for 0.1 to 0.2 ms, then yields its core: the late thread may need that core.
class Barrier {
 public:
  void reset(int threads) {
    threads_ = threads;
    waiting_.store(0, std::memory_order_relaxed);
    round_.store(0, std::memory_order_relaxed);
  }
  void wait();

 private:
  // The spaces put the counters on cache lines of their own. Alignment would do that too, but allocating an aligned array
  // takes as long as the arithmetic of a small step.
  int threads_ = 1;
  char space_[60];
  std::atomic<int> waiting_{0};
  char more_space_[60];
  std::atomic<unsigned> round_{0};
  char last_space_[60];
};

}  // namespace fused_rnn::cpu
