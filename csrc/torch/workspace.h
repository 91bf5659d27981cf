// Memory for one call of the CPU kernels.
#pragma once
#include <cstdint>

#include "torch/memory.h"

namespace fused_rnn {

// The memory lasts as long as the object.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { give(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // New memory; what the object had before is given back.
  void* take(int64_t bytes) {
    give();
    memory_ = MemoryPool::take_workspace(bytes);
    bytes_ = bytes;
    return memory_;
  }

 private:
  void give() {
    if (memory_) MemoryPool::give_workspace(memory_, bytes_);
    memory_ = nullptr;
  }

  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fused_rnn
