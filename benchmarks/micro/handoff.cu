// Hand-off between blocks through L2, as family `grid` exchanges states: kL2HandOffUs of csrc/plan/machine.h.
//   tagged  data as flag: every word carries the number of its step (store_tagged, load_tagged)
//   flag    plain data, then a flag with release and acquire (store_release, load_acquire)
// one_way: half a round trip of one word between two blocks on different SMs, median over several such blocks.
// exchange: a step in which each of n blocks publishes the states of 16 units x 8 rows (16-bit: 64 words) and reads those of
// all n, without any arithmetic.
#include "handoff_kernels.cuh"
#include "micro.cuh"

namespace {

using namespace micro;
using namespace micro::handoff;

void measure() {
  constexpr int kIterations = 10000;
  const fused_rnn::DeviceInfo device = simt::query_device(0);
  const int sms = device.sm_count;
  constexpr int kMostBlocks = 256;
  HandOff p{};
  p.iterations = kIterations;
  p.tagged = device_array<simt::TaggedWord>(2 * kMostBlocks * kWords);
  p.data = device_array<uint32_t>(2 * kMostBlocks * kWords);
  p.flags = device_array<uint32_t>(32 * kMostBlocks);
  p.ticks = device_array<Ticks>(1);
  const auto timed = [&](void (*kernel)(HandOff), const char* name, int blocks) {
    // All that a block may have: one on each SM.
    simt::prepare(kernel, name, device.smem_per_block);
    return median_of_launches(p.ticks, [&] {
      check(cudaMemset(p.tagged, 0, 2 * kMostBlocks * kWords * sizeof(simt::TaggedWord)), "memset");
      check(cudaMemset(p.flags, 0, 32 * kMostBlocks * sizeof(uint32_t)), "memset");
      simt::launch(kernel, {name, blocks, 1, 1, kThreads, device.smem_per_block, 1, false, true}, nullptr, p);
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
