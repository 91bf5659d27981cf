// Stand-in for torch's header: streams that are numbers, each in order of the host.
#pragma once
#include <c10/core/Device.h>

#include <cstdint>

namespace c10::cuda {
struct CUDAStream {
  intptr_t number;
  void* stream() const { return reinterpret_cast<void*>(number); }
  c10::DeviceIndex device_index() const { return 0; }
};
inline CUDAStream getCurrentCUDAStream() { return {0}; }
inline CUDAStream getStreamFromPool(bool, c10::DeviceIndex) {
  static intptr_t latest = 0;
  return {++latest};
}
}  // namespace c10::cuda
