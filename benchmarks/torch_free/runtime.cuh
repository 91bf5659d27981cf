// What the kernels rely on that the simulator cannot show: dependent launches, cooperative launches on several streams.
#pragma once
#include <chrono>
#include <simt.cuh>

#include "timing.cuh"

namespace torch_free {

struct Spin {
  long long clocks;
};
__global__ void __launch_bounds__(256, 1) spin_kernel(const Spin p) {
  const long long start = clock64();
  while (clock64() - start < p.clocks) {
  }
}

// Do two cooperative launches on two streams run side by side, as overlapping layers need it?
inline void cooperative_side_by_side() {
  cudaStream_t streams[2];
  for (auto& stream : streams) simt::check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, -1), "stream");
  const int smem = cuda::device_info(0).smem_per_block;
  simt::prepare(spin_kernel, "spin", smem);
  for (bool cooperative : {false, true}) {
    for (int blocks : {16, 60, 100}) {
      double us[2];
      for (int count : {1, 2}) {
        double& best = us[count - 1];
        best = 1e9;
        for (int i = 0; i < 3; ++i) {
          wait("spin");
          const auto start = std::chrono::steady_clock::now();
          for (int k = 0; k < count; ++k) {
            simt::launch(spin_kernel, {"spin", blocks, 1, 1, 256, smem, 1, false, cooperative}, streams[k], Spin{3'000'000});
          }
          wait("spin");
          best = std::min(best, since(start));
        }
      }
      std::printf("coop %s, %d blocks: one %.0f us, two on two streams %.0f us: %s\n", cooperative ? "cooperative" : "plain",
                  blocks, us[0], us[1], us[1] < 1.5 * us[0] ? "side by side" : "one after the other");
    }
  }
}

struct Meet {
  simt::TaggedWord* words;  // [block][2]
  int rounds;
};
__global__ void __launch_bounds__(256, 1) meet_kernel(const Meet p) {
  if (threadIdx.x >= 32) return;
  for (uint32_t round = 1; round <= static_cast<uint32_t>(p.rounds); ++round) {
    if (threadIdx.x == 0) simt::store_tagged(p.words + 2 * blockIdx.x, {round, round});
    for (unsigned other = threadIdx.x; other < gridDim.x; other += 32) {
      simt::TaggedWord words[2];
      do {
        simt::load_tagged(words, p.words + 2 * other);
      } while (words[0].tag < round);
    }
    __syncwarp();
  }
}

// Cooperative launches whose blocks wait for each other, on streams of two priorities, more blocks than the device has SMs,
// beside kernels that fill it: they hang if a launch may be resident in part.
inline void cooperative_meet() {
  cudaStream_t streams[4];
  for (int i = 0; i < 4; ++i) {
    simt::check(cudaStreamCreateWithPriority(&streams[i], cudaStreamNonBlocking, i % 2 ? 0 : -1), "stream");
  }
  const DeviceInfo& device = cuda::device_info(0);
  const int smem = device.smem_per_block;
  simt::prepare(spin_kernel, "spin", smem);
  simt::prepare(meet_kernel, "meet", smem);
  Memory memory;
  const int blocks[] = {device.sm_count * 45 / 100, device.sm_count * 75 / 100, device.sm_count};
  simt::TaggedWord* words[3];
  for (auto& w : words) w = static_cast<simt::TaggedWord*>(memory.take(16 * device.sm_count, 0));
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 200; ++i) {
    for (int k = 0; k < 3; ++k) {
      simt::check(cudaMemsetAsync(words[k], 0, 16 * device.sm_count, streams[k]), "memset");
      simt::launch(meet_kernel, {"meet", blocks[k], 1, 1, 256, smem, 1, false, true}, streams[k], Meet{words[k], 50});
    }
    simt::launch(spin_kernel, {"spin", 3 * device.sm_count, 1, 1, 256, smem, 1, false, false}, streams[3], Spin{20000});
  }
  wait("meet");
  std::printf("meet: 600 cooperative launches of %d, %d and %d blocks on three streams ended in %.0f ms\n", blocks[0],
              blocks[1], blocks[2], since(start) / 1e3);
}

struct Chain {
  float* from;
  float* to;
  int n;
};
__global__ void __launch_bounds__(256) chain_kernel(const Chain p) {
  simt::pdl_wait();
  simt::pdl_launch_dependents();
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  if (i < p.n) p.to[i] = p.from[(i + 4097) % p.n] + 1.0f;
}

// A chain of launches, each of which may begin before the one before it has ended: is every write seen? Returns whether.
inline bool dependent_launches() {
  const int n = 132 * 8 * 256, launches = 2000;
  Memory memory;
  auto* a = static_cast<float*>(memory.take(n * 4, 0));
  auto* b = static_cast<float*>(memory.take(n * 4, 0));
  for (int i = 0; i < launches; ++i) {
    simt::launch(chain_kernel, {"chain", n / 256, 1, 1, 256, 0, 1, i > 0, false}, nullptr,
                 Chain{i % 2 ? b : a, i % 2 ? a : b, n});
  }
  wait("chain");
  const auto got = fetch(a, n * 4);
  int wrong = 0;
  for (int i = 0; i < n; ++i) wrong += reinterpret_cast<const float*>(got.data())[i] != launches;
  std::printf("pdl: %d of %d elements wrong after %d launches\n", wrong, n, launches);
  return wrong == 0;
}

}  // namespace torch_free
