#include "cpu/cache_lock.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fused_rnn::cpu {

std::mutex& cache_lock() {
  static std::mutex* const only = new std::mutex;  // never destroyed: a thread may end after the process's static objects
  return *only;
}

#if defined(__unix__) || defined(__APPLE__)
namespace {
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { cache_lock().lock(); }, [] { cache_lock().unlock(); }, [] { cache_lock().unlock(); });
}  // namespace
#endif

}  // namespace fused_rnn::cpu
