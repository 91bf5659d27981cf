// The part of OpenMP that csrc/cpu/threads.cpp uses, on std::thread. ThreadSanitizer then sees every thread and every join,
// which it does not see of libgomp. A region may also be given fewer threads than it asks for, and an allocation may fail.
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "harness.h"

namespace {

int most_threads = 1, granted_threads = 1 << 20;
thread_local int thread_number = 0, thread_count = 1;
thread_local bool in_region = false;

void run_as(void (*region)(void*), void* data, int number, int count) {
  thread_number = number, thread_count = count, in_region = true;
  region(data);
  thread_number = 0, thread_count = 1, in_region = false;
}

}  // namespace

namespace fused_rnn::cpu {
// In place of csrc/cpu/processors.cpp: the harness's own number of threads is the limit.
int processors();
int processors() { return 64; }
}  // namespace fused_rnn::cpu

namespace harness {
void set_threads(int most, int granted) { most_threads = most, granted_threads = granted; }
}  // namespace harness

extern "C" {
// Threads never lack a core by this clock, which runs like that on the wall. csrc/cpu/threads.cpp lowers its limit where
// threads lack cores, so that tests would depend on what else the machine does.
int clock_gettime(clockid_t clock, timespec* time) noexcept {
  return static_cast<int>(syscall(SYS_clock_gettime, clock == CLOCK_THREAD_CPUTIME_ID ? CLOCK_MONOTONIC : clock, time));
}

int omp_get_max_threads() { return most_threads; }
int omp_get_num_threads() { return thread_count; }
int omp_get_thread_num() { return thread_number; }
int omp_get_num_procs() { return 64; }
int omp_in_parallel() { return in_region; }

void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
  const int count = static_cast<int>(threads) < granted_threads ? static_cast<int>(threads) : granted_threads;
  std::vector<std::thread> others;
  {
    const harness::NoFailures none;  // a thread that cannot be started ends a process under every OpenMP
    for (int i = 1; i < count; ++i) others.emplace_back(run_as, region, data, i, count);
  }
  run_as(region, data, 0, count);
  for (std::thread& other : others) other.join();
}
}
