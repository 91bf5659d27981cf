// Remote pushes inside a cluster: st.async into another block's shared memory, counted by an mbarrier there, as family
// `cluster` exchanges states. Two figures for clusters of 2, 4, 8 and 16 blocks:
//   one_way   half a round trip of 16 bytes between the first and the last block
//   exchange  a step in which every block pushes the 256 bytes of its 16 units x 8 rows (16-bit) to all blocks, waits for
//             all and meets at a block barrier: kClusterHandOffUs of csrc/plan/machine.h
#include "micro.cuh"
#include "push_kernels.cuh"

namespace {

using namespace micro;
using namespace micro::push;

void measure() {
  constexpr int kIterations = 10000;
  Ticks* ticks = device_array<Ticks>(1);
  struct {
    void (*kernel)(Push);
    const char* name;
    double per_iteration;
    const char* constant;
  } const kinds[] = {{one_way_kernel, "push_one_way", 2.0, ""},
                     {exchange_kernel, "push_exchange", 1.0, "kClusterHandOffUs"}};
  for (const auto& kind : kinds) {
    simt::prepare(kind.kernel, kind.name, sizeof(Shared));
    simt::allow_large_clusters(kind.kernel, kind.name);
    for (int ranks : {2, 4, 8, 16}) {
      const Push push{kIterations, ranks, ticks};
      const simt::LaunchConfig config{kind.name, ranks, 1, 1, kThreads, sizeof(Shared), ranks, false, false};
      const Ticks t = median_of_launches(ticks, [&] { simt::launch(kind.kernel, config, nullptr, push); });
      const double count = kIterations * kind.per_iteration;
      report(kind.name, number("cluster", ranks), t.nanoseconds * 1e-3 / count, "us", kind.constant);
      report(kind.name, number("cluster", ranks), t.clocks / count, "clocks", "");
    }
  }
}

}  // namespace

int main() { return micro::run(90, measure); }
