// The exchanging kernels of the microbenchmarks (benchmarks/micro), for test_micro_kernels.py: do they end, without a race?
#include <launch.cuh>
#include <string>

#include "../../../benchmarks/micro/handoff_kernels.cuh"
#include "../../../benchmarks/micro/push_kernels.cuh"
#include "../runtime/capi.h"

// memory: tagged words, data, flags, ticks, of a HandOff; for pushes ticks alone is used. shape: blocks, iterations, peer.
extern "C" int simt_run_micro(const char* name, const int* shape, void* const* memory) {
  using namespace fused_rnn;
  namespace handoff = micro::handoff;
  namespace push = micro::push;
  return simt_host::run_guarded([&] {
    const std::string wanted = name;
    const int blocks = shape[0], iterations = shape[1];
    auto* ticks = static_cast<micro::Ticks*>(memory[3]);
    if (wanted == "push_one_way" || wanted == "push_exchange") {
      const auto kernel = wanted == "push_one_way" ? push::one_way_kernel : push::exchange_kernel;
      simt::prepare(kernel, name, sizeof(push::Shared));
      if (blocks > 8) simt::allow_large_clusters(kernel, name);
      simt::launch(kernel, {name, blocks, 1, 1, push::kThreads, sizeof(push::Shared), blocks, false, false}, nullptr,
                   push::Push{iterations, blocks, ticks});
      return;
    }
    const handoff::HandOff p{iterations,
                             shape[2],
                             blocks,
                             static_cast<simt::TaggedWord*>(memory[0]),
                             static_cast<uint32_t*>(memory[1]),
                             static_cast<uint32_t*>(memory[2]),
                             ticks};
    const auto kernel = wanted == "one_way_tagged"    ? handoff::one_way_tagged_kernel
                        : wanted == "one_way_flag"    ? handoff::one_way_flag_kernel
                        : wanted == "exchange_tagged" ? handoff::exchange_tagged_kernel
                                                      : handoff::exchange_flag_kernel;
    simt::launch(kernel, {name, blocks, 1, 1, handoff::kThreads, 0, 1, false, true}, nullptr, p);
  });
}
