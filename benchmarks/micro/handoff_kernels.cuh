// The kernels of handoff.cu.
#pragma once
#include <simt.cuh>
#include <ticks.cuh>

namespace micro::handoff {

namespace simt = fused_rnn::simt;

constexpr int kThreads = 256, kWords = 64;

struct HandOff {
  int iterations;
  int peer;    // one_way: the block that block 0 talks to
  int blocks;  // exchange: of the launch
  simt::TaggedWord* tagged;
  uint32_t* data;
  uint32_t* flags;  // 32 words apart
  Ticks* ticks;
};

__global__ void __launch_bounds__(kThreads) one_way_tagged_kernel(const HandOff p) {
  const int block = simt::block_x();
  if (simt::thread_x() != 0 || (block != 0 && block != p.peer)) return;
  simt::TaggedWord* mine = p.tagged + (block == 0 ? 0 : 32);
  const simt::TaggedWord* theirs = p.tagged + (block == 0 ? 32 : 0);
  const auto await = [&](uint32_t tag) {
    simt::TaggedWord words[2];
    do {
      simt::load_tagged(words, theirs);
    } while (words[0].tag != tag);
  };
  const Ticks start = now();
  for (int i = 0; i < p.iterations; ++i) {
    const uint32_t tag = static_cast<uint32_t>(i) + 1;
    if (block == 0) simt::store_tagged(mine, {tag, tag});
    await(tag);
    if (block != 0) simt::store_tagged(mine, {tag, tag});
  }
  if (block == 0) store_elapsed(p.ticks, start);
}

__global__ void __launch_bounds__(kThreads) one_way_flag_kernel(const HandOff p) {
  const int block = simt::block_x();
  if (simt::thread_x() != 0 || (block != 0 && block != p.peer)) return;
  const int mine = block == 0 ? 0 : 32, theirs = 32 - mine;
  const auto give = [&](uint32_t value) {
    p.data[mine] = value;
    simt::store_release(p.flags + mine, value);
  };
  uint32_t sum = 0;
  const Ticks start = now();
  for (int i = 0; i < p.iterations; ++i) {
    const uint32_t value = static_cast<uint32_t>(i) + 1;
    if (block == 0) give(value);
    while (simt::load_acquire(p.flags + theirs) != value) {
    }
    sum += p.data[theirs];
    if (block != 0) give(value);
  }
  if (block == 0) store_elapsed(p.ticks, start);
  p.data[mine + 1] = sum;
}

// [2][block][64 words]; lane pairs as in csrc/cuda/exchange_grid.cuh.
__global__ void __launch_bounds__(kThreads) exchange_tagged_kernel(const HandOff p) {
  uint32_t sum = 0;
  const Ticks start = now();
  for (int step = 0; step < p.iterations; ++step) {
    const uint32_t tag = static_cast<uint32_t>(step) + 1;
    simt::TaggedWord* states = p.tagged + static_cast<int64_t>(step & 1) * p.blocks * kWords;
    if (simt::thread_x() < kWords) simt::store_tagged(states + simt::block_x() * kWords + simt::thread_x(), {sum, tag});
    for (int piece = simt::thread_x(); piece < p.blocks * kWords / 2; piece += kThreads) {
      simt::TaggedWord words[2];
      do {
        simt::load_tagged(words, states + 2 * piece);
      } while (words[0].tag != tag || words[1].tag != tag);
      sum += words[0].value ^ words[1].value;
    }
    simt::sync_block();
  }
  if (simt::block_x() == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
  if (sum == 12345) p.data[0] = sum;
}

__global__ void __launch_bounds__(kThreads) exchange_flag_kernel(const HandOff p) {
  uint32_t sum = 0;
  const Ticks start = now();
  for (int step = 0; step < p.iterations; ++step) {
    const uint32_t value = static_cast<uint32_t>(step) + 1;
    uint32_t* states = p.data + static_cast<int64_t>(step & 1) * p.blocks * kWords;
    if (simt::thread_x() < kWords) states[simt::block_x() * kWords + simt::thread_x()] = sum;
    simt::sync_block();
    if (simt::thread_x() == 0) simt::store_release(p.flags + simt::block_x() * 32, value);
    for (int other = simt::thread_x(); other < p.blocks; other += kThreads) {
      // A fast block may be one step ahead.
      while (static_cast<int32_t>(simt::load_acquire(p.flags + other * 32) - value) < 0) {
      }
    }
    simt::sync_block();
    for (int piece = simt::thread_x(); piece < p.blocks * kWords / 2; piece += kThreads) {
      const auto words = simt::load_vec<2>(states + 2 * piece);
      sum += words.v[0] ^ words.v[1];
    }
  }
  if (simt::block_x() == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
  if (sum == 12345) p.data[0] = sum;
}

}  // namespace micro::handoff
