// How many clusters of 1 to 16 blocks run at once, with 100 and 200 KiB of shared memory and 256 threads a block: what the
// planner takes to be sm_count / blocks (csrc/plan_persistent.cpp, fit_cluster).
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
    simt::prepare(empty_kernel, "empty", kib * 1024);
    simt::allow_large_clusters(empty_kernel, "empty");
    for (int blocks = 1; blocks <= 16; ++blocks) {
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(blocks);
      config.blockDim = dim3(256);
      config.dynamicSmemBytes = kib * 1024;
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = blocks;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      // A size that the device does not have counts as none.
      const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config);
      if (cudaGetLastError() != cudaErrorInvalidClusterSize) check(status, "cudaOccupancyMaxActiveClusters");
      report("active_clusters", number("cluster", blocks) + ", " + number("smem_kib", kib), clusters, "clusters",
             "fit_cluster");
    }
  }
}

}  // namespace

int main() { return micro::run(90, measure); }
