#include "torch/memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/cache_lock.h"

namespace fused_rnn {
namespace {

enum class Use { kWorkspace, kTensor };

double now() {
#ifdef CLOCK_MONOTONIC_COARSE
  timespec t{};
  if (clock_gettime(CLOCK_MONOTONIC_COARSE, &t) == 0)
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Blocks to be freed when the object dies, after the lock is released. The first bytes of each point to the next.
class Dropped {
 public:
  Dropped() = default;
  ~Dropped() {
    while (first_) {
      void* memory = first_;
      first_ = *static_cast<void**>(memory);
      c10::free_cpu(memory);
    }
  }
  Dropped(const Dropped&) = delete;
  Dropped& operator=(const Dropped&) = delete;
  void add(void* memory) { *static_cast<void**>(memory) = std::exchange(first_, memory); }

 private:
  void* first_ = nullptr;
};

// A thread's own small workspace while no call of the thread has it. Only the thread changes `bytes`.
struct Slot {
  std::atomic<void*> memory{nullptr};
  std::atomic<int64_t> bytes{0};
  unsigned calls = 0;
};

struct Block {
  void* memory;
  int64_t bytes;
  Use use;
  double given;
  int64_t requests;  // of its use, when it was given
};

std::atomic<double> idle_seconds{MemoryPool::kIdleSeconds};

// What all threads keep together. Whoever uses it holds cpu::cache_lock().
class Pool {
 public:
  Pool() { blocks_.reserve(kMostBlocks); }

  // The memory of a block that serves, and its size; or null.
  void* take(Use use, int64_t& bytes, Dropped& dropped) {
    ++requests_[static_cast<int>(use)];
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->use != use || !serves(*block, bytes)) continue;
      // A workspace: the one given last, so that workspaces of several sizes in one call share it. A tensor: the block that
      // fits best.
      if (best == blocks_.end() || use == Use::kWorkspace || block->bytes < best->bytes) best = block;
    }
    void* memory = nullptr;
    if (best != blocks_.end()) {
      bytes = best->bytes;
      memory = best->memory;
      erase(best);
    }
    drop_idle(dropped);
    return memory;
  }
  void give(Use use, void* memory, int64_t bytes, Dropped& dropped) {
    while (!blocks_.empty() && (bytes_ + bytes > MemoryPool::kMostShared || blocks_.size() == kMostBlocks)) {
      dropped.add(blocks_.front().memory);  // the oldest go first
      erase(blocks_.begin());
    }
    blocks_.push_back({memory, bytes, use, now(), requests_[static_cast<int>(use)]});
    bytes_ += bytes;
    drop_idle(dropped);
  }
  void drop_idle(Dropped& dropped) {
    const double time = now(), seconds = idle_seconds;
    const int64_t patience = kPatience * std::max<int64_t>(static_cast<int64_t>(slots.size()), 1);
    for (auto block = blocks_.begin(); block != blocks_.end();) {
      if (time - block->given <= seconds && requests_[static_cast<int>(block->use)] - block->requests <= patience) {
        ++block;
        continue;
      }
      dropped.add(block->memory);
      block = erase(block);
    }
  }
  void drop_all(Dropped& dropped) {
    for (const Block& block : blocks_) dropped.add(block.memory);
    blocks_.clear();
    bytes_ = 0;
  }
  int64_t bytes() const { return bytes_; }  // without the lock too
  int64_t count() const { return static_cast<int64_t>(blocks_.size()); }

  std::vector<Slot*> slots;  // of the threads that run

 private:
  static constexpr size_t kMostBlocks = MemoryPool::kMostShared / MemoryPool::kLeastShared;
  static constexpr int64_t kPatience = 32;  // requests of each thread that did not want a block

  static bool serves(const Block& block, int64_t bytes) {
    return block.bytes >= bytes && block.bytes <= (block.use == Use::kWorkspace ? 4 * bytes : bytes + bytes / 4);
  }
  std::vector<Block>::iterator erase(std::vector<Block>::iterator block) {
    bytes_ -= block->bytes;
    return blocks_.erase(block);
  }

  std::vector<Block> blocks_;  // the oldest first
  std::atomic<int64_t> bytes_{0};
  int64_t requests_[2] = {0, 0};
};
Pool& pool() {
  static Pool* const only = new Pool;  // never destroyed: tensors may outlive the process's static objects
  return *only;
}

void* take_shared(Use use, int64_t& bytes) {
  if (bytes <= MemoryPool::kMostShared) {
    Dropped dropped;
    const std::lock_guard<std::mutex> held(cpu::cache_lock());
    if (void* memory = pool().take(use, bytes, dropped)) return memory;
  }
  return c10::alloc_cpu(bytes);
}

void give_shared(Use use, void* memory, int64_t bytes) {
  Dropped dropped;
  if (bytes > MemoryPool::kMostShared) {
    dropped.add(memory);
    return;
  }
  const std::lock_guard<std::mutex> held(cpu::cache_lock());
  pool().give(use, memory, bytes, dropped);
}

// The calling thread's slot. Slots lie on the heap, because a forked child reuses the stacks and thread-local memory of the
// threads that it does not have.
class OwnSlot {
 public:
  OwnSlot() : slot_(std::make_unique<Slot>()) {
    const std::lock_guard<std::mutex> held(cpu::cache_lock());
    pool().slots.push_back(slot_.get());
  }
  ~OwnSlot() {
    {
      const std::lock_guard<std::mutex> held(cpu::cache_lock());
      std::vector<Slot*>& slots = pool().slots;
      slots.erase(std::find(slots.begin(), slots.end(), slot_.get()));
    }
    if (void* memory = slot_->memory.load()) c10::free_cpu(memory);
  }
  OwnSlot(const OwnSlot&) = delete;
  OwnSlot& operator=(const OwnSlot&) = delete;
  Slot* operator->() const { return slot_.get(); }

 private:
  const std::unique_ptr<Slot> slot_;
};
OwnSlot& own_slot() {
  static thread_local OwnSlot slot;
  return slot;
}

}  // namespace

at::Tensor MemoryPool::empty(at::IntArrayRef shape, at::ScalarType type, int64_t bytes) {
  // Gives the memory back once, when the tensor is gone or could not be made.
  struct Block {
    void* memory = nullptr;
    int64_t size;
    ~Block() {
      if (memory) give_shared(Use::kTensor, memory, size);
    }
  };
  const auto block = std::make_shared<Block>();
  block->size = bytes;
  block->memory = take_shared(Use::kTensor, block->size);
  return at::from_blob(block->memory, shape, [block](void*) {}, at::TensorOptions(type));
}

void* MemoryPool::take_workspace(int64_t& bytes) {
  if (bytes >= kLeastShared) return take_shared(Use::kWorkspace, bytes);
  OwnSlot& own = own_slot();
  constexpr unsigned kLook = 1024;  // calls between looks for what other threads left idle
  if (own->calls++ % kLook == 0 && pool().bytes() > 0) {
    Dropped dropped;
    const std::lock_guard<std::mutex> held(cpu::cache_lock());
    pool().drop_idle(dropped);
  }
  void* memory = own->memory.exchange(nullptr, std::memory_order_acquire);
  const int64_t size = own->bytes.load(std::memory_order_relaxed);
  if (memory && size >= bytes) {
    bytes = size;
    return memory;
  }
  if (memory) c10::free_cpu(memory);
  bytes = std::max<int64_t>(bytes, 64);
  return c10::alloc_cpu(bytes);
}

void MemoryPool::give_workspace(void* memory, int64_t bytes) {
  if (bytes >= kLeastShared) return give_shared(Use::kWorkspace, memory, bytes);
  OwnSlot& own = own_slot();
  own->bytes.store(bytes, std::memory_order_relaxed);
  if (void* other = own->memory.exchange(memory, std::memory_order_acq_rel)) c10::free_cpu(other);
}

MemoryPool::Statistics MemoryPool::statistics() {
  const std::lock_guard<std::mutex> held(cpu::cache_lock());
  Statistics result{pool().bytes(), pool().count(), 0, static_cast<int64_t>(pool().slots.size())};
  for (const Slot* slot : pool().slots) {
    if (slot->memory.load()) result.thread_bytes += slot->bytes.load();
  }
  return result;
}

int64_t MemoryPool::free() {
  Dropped dropped;
  const std::lock_guard<std::mutex> held(cpu::cache_lock());
  int64_t bytes = pool().bytes();
  pool().drop_all(dropped);
  for (Slot* slot : pool().slots) {
    if (void* memory = slot->memory.exchange(nullptr)) {
      bytes += slot->bytes.load();
      dropped.add(memory);
    }
  }
  return bytes;
}

void MemoryPool::set_idle_seconds(double seconds) { idle_seconds = seconds; }

}  // namespace fused_rnn
