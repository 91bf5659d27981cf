// A pool of memory for calls on a CPU: workspaces (workspace.h), what a training forward saves, backward's gradients of the
// gates, and gradients of weights by sample. New memory is mapped and cleared page by page, which costs a tenth of a
// training step of LSTM 128x64x256x256 (half of it where a virtual machine hands freed pages back to its host), and a sixth
// of LSTM 64x8x1024x1024.
//
// All threads share the blocks of kLeastShared bytes or more: the pool holds up to kMostShared bytes of them, each for
// kIdleSeconds. A thread keeps one smaller block for itself, and takes and returns it by an atomic exchange, without a lock.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fused_rnn {

class MemoryPool {
 public:
  static constexpr int64_t kLeastShared = int64_t{1} << 20, kMostShared = int64_t{256} << 20;
  static constexpr double kIdleSeconds = 10;

  // Uninitialised memory of at least kLeast bytes as a tensor. From 1 MiB on malloc gives memory back to the system as often
  // as it takes it: with a limit of 4 MiB the gradients by sample of an RNN 32x16x128x128 took twice as long, of a GRU 2.5
  // times (Xeon with AMX, torch 2.13).
  static constexpr int64_t kLeast = kLeastShared;
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
