// How many clusters of 2 to 16 blocks run at once, with 100 and 200 KiB of shared memory and 256 threads a block. The
// planner asks a device that is there for such figures, and estimates those of a described one (csrc/plan/machine.cpp,
// clusters_at_once).
#include "micro.cuh"

namespace {

using namespace micro;

struct Nothing {
  int* memory;
};

__global__ void __launch_bounds__(256) empty_kernel(const Nothing p) {
  if (p.memory) p.memory[simt::thread_x()] = static_cast<int>(simt::dynamic_smem()[simt::thread_x()]);
}

void measure() {
  for (int kib : {100, 200}) {
    for (int blocks = 2; blocks <= 16; ++blocks) {
      report("active_clusters", number("cluster", blocks) + ", " + number("smem_kib", kib),
             simt::active_clusters(empty_kernel, blocks, 256, kib * 1024), "clusters", "clusters_at_once");
    }
  }
}

}  // namespace

int main() { return micro::run(90, measure); }
