// Memory of calls on a CPU that is kept for the next one: workspaces (workspace.h), what a training forward saves, and
// backward's gradients of the gates. New memory has to be mapped and cleared page by page: a tenth of a training step of
// LSTM 128x64x256x256, and half of one where a virtual machine hands freed pages back to its host; a sixth of the time of
// LSTM 64x8x1024x1024.
//
// Blocks of kLeastShared bytes or more are kept for all threads together, up to kMostShared bytes, and for kIdleSeconds.
// Smaller ones stay with their thread, one each: a small call takes it and puts it back by an exchange, without a lock.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fused_rnn {

class MemoryPool {
 public:
  static constexpr int64_t kLeastShared = int64_t{1} << 20, kMostShared = int64_t{256} << 20;
  static constexpr double kIdleSeconds = 10;

  // Uninitialised memory of at least kLeast bytes as a tensor.
  static constexpr int64_t kLeast = int64_t{4} << 20;
  static at::Tensor empty(at::IntArrayRef shape, at::ScalarType type, int64_t bytes);

  // Memory of at least so many bytes, aligned to 64; `bytes` becomes its size.
  static void* take_workspace(int64_t& bytes);
  static void give_workspace(void* memory, int64_t bytes);

  struct Statistics {
    int64_t shared_bytes, shared_blocks;
    int64_t thread_bytes, threads;  // of threads that run and have called
  };
  static Statistics statistics();
  // Frees what no call has in use; returns its bytes.
  static int64_t free();
  // Instead of kIdleSeconds, for tests.
  static void set_idle_seconds(double seconds);
};

}  // namespace fused_rnn
