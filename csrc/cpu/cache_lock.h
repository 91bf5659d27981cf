// One lock for all caches that threads share: packed weights (gemm/weight_cache.h) and memory (torch/memory.h). A thread
// holds it while it searches, never while it allocates or frees large memory. A fork waits for it, so that the child's
// caches are whole.
#pragma once
#include <mutex>

namespace fused_rnn::cpu {

std::mutex& cache_lock();

}  // namespace fused_rnn::cpu
