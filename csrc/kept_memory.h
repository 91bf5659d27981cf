// Memory of large tensors that a training step on a CPU has for itself: what forward saves, and backward's gradients of the gates.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <memory>
#include <vector>

namespace fused_rnn {

// A thread keeps what it frees for its next call, up to kMostKept bytes, until kPatience requests did not want it. An allocator returns
// memory of tens of megabytes to the system at once, and new pages have to be mapped and cleared: a tenth of a training step of LSTM
// 128x64x256x256, and half of one where a virtual machine hands freed pages back to its host.
class KeptMemory {
 public:
  static constexpr int64_t kLeast = int64_t{4} * 1024 * 1024, kMostKept = int64_t{256} * 1024 * 1024;

  // Uninitialised memory of at least kLeast bytes as a tensor.
  static at::Tensor empty(at::IntArrayRef shape, at::ScalarType type, int64_t bytes) {
    int64_t size = bytes;
    void* memory = gone_ ? c10::alloc_cpu(bytes) : kept_.take(size);
    return at::from_blob(memory, shape, [size](void* freed) { give(freed, size); }, at::TensorOptions(type));
  }

 private:
  static constexpr int kPatience = 32;
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t bytes;
    int idle;
  };

  ~KeptMemory() { gone_ = true; }

  // A block of `bytes` or up to a quarter more; bytes becomes its size.
  void* take(int64_t& bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes <= bytes + bytes / 4;
      if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
      ++block->idle;
    }
    void* memory = nullptr;
    if (best != blocks_.end()) {
      bytes = best->bytes;
      memory = best->memory.release();
      blocks_.erase(best);
    }
    blocks_.erase(std::remove_if(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.idle > kPatience; }),
                  blocks_.end());
    return memory ? memory : c10::alloc_cpu(bytes);
  }

  static void give(void* memory, int64_t bytes) {
    Block block{std::unique_ptr<void, Free>(memory), bytes, 0};
    if (gone_ || bytes > kMostKept) return;
    std::vector<Block>& blocks = kept_.blocks_;
    int64_t sum = bytes;
    for (const Block& b : blocks) sum += b.bytes;
    while (sum > kMostKept) {  // the oldest go first
      sum -= blocks.front().bytes;
      blocks.erase(blocks.begin());
    }
    blocks.push_back(std::move(block));
  }

  std::vector<Block> blocks_;
  static thread_local bool gone_;  // tensors may outlive what their thread keeps
  static thread_local KeptMemory kept_;
};

inline thread_local bool KeptMemory::gone_ = false;
inline thread_local KeptMemory KeptMemory::kept_;

}  // namespace fused_rnn
