// One lock for all that is kept from call to call, by all threads (weight_cache.h, ../kept_memory.h). It is held for the
// time of a search, never while large memory is allocated or freed; a fork waits for it, so that a child finds everything
// whole.
#pragma once
#include <mutex>

namespace fused_rnn::cpu {

std::mutex& cache_lock();

}  // namespace fused_rnn::cpu
