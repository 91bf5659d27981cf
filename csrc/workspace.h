// Memory for one call of the CPU kernels.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/alloc_cpu.h>

#include <memory>

namespace fused_rnn {

// Lasts as long as the object; a thread has one at a time. One of a moderate size stays with the thread for its next call: the pages of a
// new one would have to be mapped and cleared, a tenth of the time of a call of half a millisecond.
class Workspace {
 public:
  void* take(int64_t bytes) {
    if (bytes > kMostKept) {
      large_ = at::empty({bytes}, at::kByte);
      return large_.data_ptr();
    }
    static thread_local Kept kept;
    if (kept.bytes < bytes) {
      kept = {};
      kept.memory.reset(c10::alloc_cpu(bytes));
      kept.bytes = bytes;
    }
    return kept.memory.get();
  }

 private:
  static constexpr int64_t kMostKept = int64_t{16} * 1024 * 1024;
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  struct Kept {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };
  Tensor large_;
};

}  // namespace fused_rnn
