// Memory for one call of the CPU kernels.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>

#include <memory>

namespace fused_rnn {

// Lasts as long as the object; a thread has one at a time. Up to kMostKept bytes stay with the thread for its next call, until
// kPatience calls in a row need less than a quarter of them: pages of new memory have to be mapped and cleared, a sixth of the
// time of LSTM 64x8x1024x1024 (50 MB) and a tenth of 50x7x33x100.
class Workspace {
 public:
  void* take(int64_t bytes) {
    if (bytes > kMostKept) {
      large_ = at::empty({bytes}, at::kByte);
      return large_.data_ptr();
    }
    static thread_local Kept kept;
    kept.idle = bytes < kept.bytes / 4 ? kept.idle + 1 : 0;
    if (kept.bytes < bytes || kept.idle > kPatience) {
      kept = {};
      kept.memory.reset(c10::alloc_cpu(bytes));
      kept.bytes = bytes;
    }
    return kept.memory.get();
  }

 private:
  static constexpr int64_t kMostKept = int64_t{64} * 1024 * 1024;
  static constexpr int kPatience = 1000;
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  struct Kept {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
    int idle = 0;
  };
  Tensor large_;
};

}  // namespace fused_rnn
