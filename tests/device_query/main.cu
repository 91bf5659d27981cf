// simt::query_device and simt::query_code on a device that is made up: a program of the library's own host code (launch.cuh,
// which the simulator replaces) and of a CUDA runtime that knows no more than what it takes. Prints compiled_for,
// max_cluster and active_clusters, or the error; before them resident_blocks. Also of launches that the device refuses.
#include <cstdio>
#include <cstdlib>
#include <launch.cuh>

#include "runtime.h"

namespace {

struct Nothing {};
__global__ void kernel(const Nothing) {}

}  // namespace

int main(int, char** arguments) {
  int* const fields[] = {&made_up.device, &made_up.capability, &made_up.compiled_for, &made_up.largest,
                         &made_up.error,  &made_up.none,       &made_up.fits};
  for (int* field : fields) *field = std::atoi(*++arguments);
  if (fused_rnn::simt::driver_version() != 12040) return 3;
  const auto kind = [](cudaError_t status) {
    try {
      fused_rnn::simt::check_launch(status, "kernel");
    } catch (const fused_rnn::LaunchRefused&) {
      return 'r';
    } catch (const std::runtime_error&) {
      return 'e';
    }
    return '-';
  };
  if (kind(cudaSuccess) != '-' || kind(cudaErrorIllegalAddress) != 'e' || kind(cudaErrorLaunchFailure) != 'e' ||
      kind(cudaErrorCooperativeLaunchTooLarge) != 'r' || kind(cudaErrorNoKernelImageForDevice) != 'r') {
    return 4;
  }
  try {
    fused_rnn::DeviceInfo info = fused_rnn::simt::query_device(made_up.device);
    if (info.dram_gb_per_s != 3352) return 5;  // 2 * 2619 MHz * 5120 bits
    fused_rnn::simt::query_code(info, made_up.device, kernel, 256);
    std::printf("%d %d %d", info.resident_blocks, info.compiled_for, info.max_cluster);
    for (int clusters : info.active_clusters) std::printf(" %d", clusters);
  } catch (const std::runtime_error& error) {
    std::printf("%s", error.what());
  }
  return as_before() ? 0 : 2;
}
