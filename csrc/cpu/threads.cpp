#include "cpu/threads.h"

#include <algorithm>
#include <chrono>
#include <ctime>

#include "cpu/crowd.h"
#include "cpu/processors.h"

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

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds that the calling thread had a core, or seconds of the wall clock where the system does not tell them apart.
double seconds_on_a_core() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0)
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#endif
  return now();
}

Crowd crowd;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int thread_limit() {
#ifdef _OPENMP
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  int threads = omp_get_max_threads();
  if (threads > 1) threads = std::min(threads, processors());
  return threads == 1 ? 1 : crowd.limit(threads, now());
#else
  return 1;
#endif
}

bool run_threads(int threads, const std::function<void(int)>& work) {
  if (threads == 1) {
    if (!crowd.limits()) {
      work(0);
      return true;
    }
    const double start = now(), before = seconds_on_a_core();
    work(0);
    const double seconds = now() - start;
    crowd.report(1, seconds, seconds - (seconds_on_a_core() - before), start + seconds);
    return true;
  }
#ifdef _OPENMP
  bool complete = true;
  std::atomic<double> lacked{0};
  const double start = now();
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      const double before = seconds_on_a_core();
      work(omp_get_thread_num());
      const double mine = (now() - start) - (seconds_on_a_core() - before);
      for (double most = lacked.load(); mine > most && !lacked.compare_exchange_weak(most, mine);) {
      }
    } else if (omp_get_thread_num() == 0) {
      complete = false;
    }
  }
  const double end = now();
  crowd.report(threads, end - start, lacked.load(), end);
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
