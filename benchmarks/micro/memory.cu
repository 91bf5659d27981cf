// What L2 and shared memory deliver to an SM.
//   l2_latency    a load that waits for the one before it, from L2: kL2LatencyUs of csrc/plan/machine.h
//   l2_bandwidth  16-byte loads of 256 threads from 16 MiB that stay in L2: kL2BytesPerClock by one SM alone,
//                 kSharedL2BytesPerClock, which is that times kL2Share, by all at once
//   smem_bandwidth  16-byte loads from shared memory, as the weights beyond the registers are read: kSmemBytesPerClock
#include "micro.cuh"

namespace {

using namespace micro;

constexpr int kThreads = 256;

struct Memory {
  int iterations;
  int64_t words;  // a power of two
  uint32_t* data;
  uint32_t* sink;
  Ticks* ticks;
};

__global__ void __launch_bounds__(kThreads) chase_kernel(const Memory p) {
  if (simt::thread_x() != 0) return;
  uint32_t at = 0;
  const Ticks start = now();
  for (int i = 0; i < p.iterations; ++i) {
    simt::TaggedWord words[2];  // its loads go to L2, not to L1
    simt::load_tagged(words, reinterpret_cast<const simt::TaggedWord*>(p.data) + at);
    at = words[0].value;
  }
  store_elapsed(p.ticks, start);
  p.sink[0] = at;
}

__global__ void __launch_bounds__(kThreads) l2_kernel(const Memory p) {
  constexpr int kUnroll = 8;
  uint32_t sum = 0;
  const int64_t pieces = p.words / 4;
  int64_t at = int64_t{simt::block_x()} * 4096 + simt::thread_x();
  const Ticks start = now();
#pragma unroll 1
  for (int i = 0; i < p.iterations; ++i) {
    simt::TaggedWord words[kUnroll][2];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      simt::load_tagged(words[u],
                        reinterpret_cast<const simt::TaggedWord*>(p.data) + 2 * ((at + u * kThreads) & (pieces - 1)));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum += words[u][0].value + words[u][1].tag;
    at += kUnroll * kThreads;
  }
  simt::sync_block();
  if (simt::block_x() == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
  p.sink[simt::block_x() * kThreads + simt::thread_x()] = sum;
}

__global__ void __launch_bounds__(kThreads) smem_kernel(const Memory p) {
  constexpr int kUnroll = 8;
  auto* words = reinterpret_cast<uint32_t*>(simt::dynamic_smem());
  for (int i = simt::thread_x(); i < kThreads * kUnroll * 4; i += kThreads) words[i] = i;
  simt::sync_block();
  uint32_t sum = 0;
  const Ticks start = now();
#pragma unroll 1
  for (int i = 0; i < p.iterations; ++i) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      // The index depends on the iteration: the loads cannot leave the loop.
      const auto piece = simt::load_vec<4>(words + ((u * kThreads + simt::thread_x() + i) % (kThreads * kUnroll)) * 4);
      sum += piece.v[0] ^ piece.v[1] ^ piece.v[2] ^ piece.v[3];
    }
  }
  simt::sync_block();
  if (simt::block_x() == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
  p.sink[simt::block_x() * kThreads + simt::thread_x()] = sum;
}

void measure() {
  const int sms = simt::query_device(0).sm_count;
  Memory p{};
  p.iterations = 2000;
  p.words = int64_t{4} << 20;
  p.data = device_array<uint32_t>(p.words);
  p.sink = device_array<uint32_t>(size_t(sms) * kThreads);
  p.ticks = device_array<Ticks>(1);
  // A cycle through 8 MiB: TaggedWord i leads to i + 81006, modulo 2^20.
  std::vector<uint32_t> chain(2 << 20);
  const uint32_t count = 1u << 20;
  for (uint32_t i = 0; i < count; i += 2) chain[2 * i] = (i + 2 * 40503) % count;
  check(cudaMemcpy(p.data, chain.data(), chain.size() * sizeof(uint32_t), cudaMemcpyHostToDevice), "copy");
  Ticks t = median_of_launches(
      p.ticks, [&] { simt::launch(chase_kernel, {"chase", 1, 1, 1, kThreads, 0, 1, false, false}, nullptr, p); });
  report("l2_latency", "", t.nanoseconds * 1e-3 / p.iterations, "us", "kL2LatencyUs");
  for (int blocks : {1, sms}) {
    t = median_of_launches(p.ticks,
                           [&] { simt::launch(l2_kernel, {"l2", blocks, 1, 1, kThreads, 0, 1, false, false}, nullptr, p); });
    report("l2_bandwidth", number("blocks", blocks), 16.0 * 8 * kThreads * p.iterations / t.clocks, "bytes per clock and SM",
           blocks == 1 ? "kL2BytesPerClock" : "kSharedL2BytesPerClock");
  }
  t = median_of_launches(p.ticks, [&] {
    simt::launch(smem_kernel, {"smem", sms, 1, 1, kThreads, kThreads * 8 * 16, 1, false, false}, nullptr, p);
  });
  report("smem_bandwidth", "", 16.0 * 8 * kThreads * p.iterations / t.clocks, "bytes per clock and SM",
         "kSmemBytesPerClock");
}

}  // namespace

int main() { return micro::run(80, measure); }
