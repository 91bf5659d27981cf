// Hand-off between blocks through L2, as family `grid` exchanges states: kL2HandOffUs of csrc/plan_persistent.cpp.
//   tagged  data as flag: every word carries the number of its step (store_tagged, load_tagged)
//   flag    plain data, then a flag with release and acquire (store_release, load_acquire)
// one_way: half a round trip of one word between two blocks on different SMs, median over several such blocks.
// exchange: a step in which each of n blocks publishes the states of 16 units x 8 rows (16-bit: 64 words) and reads those of
// all n, without any arithmetic.
#include "micro.cuh"

namespace {

using namespace micro;

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

void measure() {
  constexpr int kIterations = 10000;
  const int sms = simt::query_device(0).sm_count;
  constexpr int kMostBlocks = 256;
  HandOff p{};
  p.iterations = kIterations;
  p.tagged = device_array<simt::TaggedWord>(2 * kMostBlocks * kWords);
  p.data = device_array<uint32_t>(2 * kMostBlocks * kWords);
  p.flags = device_array<uint32_t>(32 * kMostBlocks);
  p.ticks = device_array<Ticks>(1);
  const auto timed = [&](void (*kernel)(HandOff), const char* name, int blocks) {
    // Blocks of 100 KiB: one on each SM.
    simt::prepare(kernel, name, 100 * 1024);
    return median_of_launches(p.ticks, [&] {
      check(cudaMemset(p.tagged, 0, 2 * kMostBlocks * kWords * sizeof(simt::TaggedWord)), "memset");
      check(cudaMemset(p.flags, 0, 32 * kMostBlocks * sizeof(uint32_t)), "memset");
      simt::launch(kernel, {name, blocks, 1, 1, kThreads, 100 * 1024, 1, false, true}, nullptr, p);
    });
  };
  const struct {
    const char* method;
    void (*one_way)(HandOff);
    void (*exchange)(HandOff);
  } methods[] = {{"tagged", one_way_tagged_kernel, exchange_tagged_kernel},
                 {"flag", one_way_flag_kernel, exchange_flag_kernel}};
  for (const auto& method : methods) {
    std::vector<double> us;
    for (int peer : {1, sms / 4, sms / 2, sms - 1}) {
      p.peer = peer;
      us.push_back(timed(method.one_way, "handoff_one_way", sms).nanoseconds * 1e-3 / (2.0 * kIterations));
    }
    std::sort(us.begin(), us.end());
    report("handoff_one_way", word("method", method.method), us[us.size() / 2], "us", "");
    for (int blocks : {16, 32, 48, 64, 96, 128}) {
      if (blocks > sms) continue;
      p.blocks = blocks;
      const Ticks t = timed(method.exchange, "handoff_exchange", blocks);
      report("handoff_exchange", word("method", method.method) + ", " + number("blocks", blocks),
             t.nanoseconds * 1e-3 / kIterations, "us", "kL2HandOffUs");
    }
  }
}

}  // namespace

int main() { return micro::run(80, measure); }
