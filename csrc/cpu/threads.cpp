#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

namespace fused_rnn::cpu {
namespace {

constexpr int kSpins = 4000;  // pauses before the first yield

std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
void yield() { sched_yield(); }
#else
void yield() {}
#endif

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int thread_limit() {
#ifdef _OPENMP
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return omp_get_max_threads();
#else
  return 1;
#endif
}

bool run_threads(int threads, const std::function<void(int)>& work) {
  if (threads == 1) {
    work(0);
    return true;
  }
#ifdef _OPENMP
  bool complete = true;
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      work(omp_get_thread_num());
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  return complete;
#else
  return false;
#endif
}

void prefer_huge_pages([[maybe_unused]] void* array, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 * 1024 * 1024;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(array) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (array && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void Barrier::wait() {
  if (threads_ == 1) return;
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    waiting_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  int spins = 0;
  while (round_.load(std::memory_order_acquire) == round) {
    if (spins < kSpins) {
      ++spins;
      pause();
    } else {
      yield();
    }
  }
}

}  // namespace fused_rnn::cpu
