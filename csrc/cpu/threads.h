// Threads: one parallel region of the caller's OpenMP for a whole call, and the barrier that a team meets at.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace fused_rnn::cpu {

// The most threads that a call made here and now may use: omp_get_max_threads(), at most as many as there are processors for
// this process (processors.h), fewer for a while after calls whose threads lacked cores; 1 inside a parallel region, without
// OpenMP, and in a forked child (whose copy of the parent's thread pool has no threads behind it). Results do not depend on
// it.
int thread_limit();

// Runs work(thread) for thread = 0 .. threads - 1, all at once. False, with nothing run, if fewer threads were to be had.
bool run_threads(int threads, const std::function<void(int)>& work);

// Asks for huge pages behind a large array that is about to be written for the first time: page faults are otherwise a fifth of a
// large training forward. A hint; does nothing where the system does not know it or the array is small.
void prefer_huge_pages(void* array, int64_t bytes);

// Spins for 0.1 to 0.2 ms, then yields the core: another process may hold the one that a late thread needs.
class Barrier {
 public:
  void reset(int threads) {
    threads_ = threads;
    waiting_.store(0, std::memory_order_relaxed);
    round_.store(0, std::memory_order_relaxed);
  }
  void wait();

 private:
  // Cache lines apart without being aligned: allocating an aligned array takes as long as a small step's arithmetic.
  int threads_ = 1;
  char space_[60];
  std::atomic<int> waiting_{0};
  char more_space_[60];
  std::atomic<unsigned> round_{0};
  char last_space_[60];
};

}  // namespace fused_rnn::cpu
