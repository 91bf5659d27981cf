// What the host asks of the CUDA runtime: launches of kernels, and what a device and the code on it can do. tests/simt/ has
// an implementation of the same names, which comes first on the include path when a file is compiled for the simulator.
#pragma once
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device/refused.h"
#include "plan/device_info.h"

namespace fused_rnn::simt {

struct LaunchConfig {
  const char* name;  // for error messages
  int grid_x, grid_y, grid_z;
  int threads;       // of a block (one-dimensional)
  int smem_bytes;    // dynamic shared memory
  int cluster;       // blocks of a cluster along x; 1: none
  bool pdl;          // may start before the preceding grid of the stream has ended (it calls pdl_wait)
  bool cooperative;  // all blocks run at the same time, or the launch fails
};

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error("fused_rnn: " + what + ": " + cudaGetErrorString(status));
}

// The same for a kernel that is to be launched: LaunchRefused where another kernel may do.
inline void check_launch(cudaError_t status, const std::string& what) {
  for (cudaError_t refused : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction, cudaErrorInvalidClusterSize,
                              cudaErrorCooperativeLaunchTooLarge, cudaErrorLaunchOutOfResources, cudaErrorNotSupported}) {
    if (status != refused) continue;
    (void)cudaGetLastError();
    throw LaunchRefused("fused_rnn: " + what + ": " + cudaGetErrorString(status));
  }
  check(status, what);
}

// Allows a kernel so much shared memory. Called on the device that launches, before its first launch with more than 48 KiB;
// cheap enough for once per layer.
template <class Params>
void prepare(void (*kernel)(Params), const char* name, int smem_bytes) {
  struct Prepared {
    void (*kernel)(Params);
    int device, smem_bytes;
  };
  static thread_local std::vector<Prepared> prepared;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  for (const Prepared& p : prepared) {
    if (p.kernel == kernel && p.device == device && p.smem_bytes >= smem_bytes) return;
  }
  // The attribute belongs to the kernel, whichever thread asks for it or sets it.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaFuncAttributes attributes;
  check_launch(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), std::string("kernel ") + name);
  if (smem_bytes > attributes.maxDynamicSharedSizeBytes) {
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        std::string("kernel ") + name + ": " + std::to_string(smem_bytes) + " bytes of shared memory");
  }
  prepared.push_back({kernel, device, smem_bytes});
}

// Before the first launch of a kernel in clusters of more than 8 blocks.
template <class Params>
void allow_large_clusters(void (*kernel)(Params), const char* name) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        std::string("kernel ") + name + ": clusters of more than 8 blocks");
}

// How many clusters of so many blocks (at least two) run at once on the current device; 0: it runs none of that size. All
// shared memory of `kernel` is dynamic.
template <class Params>
int active_clusters(void (*kernel)(Params), int blocks, int threads, int smem_bytes) {
  prepare(kernel, "active_clusters", smem_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto* const address = reinterpret_cast<const void*>(kernel);
  int clusters = 0;
  cudaError_t status = cudaSuccess;
  if (blocks > 8) status = cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, address, &config);
  for (cudaError_t none : {cudaErrorInvalidClusterSize, cudaErrorInvalidValue, cudaErrorInvalidConfiguration,
                           cudaErrorLaunchOutOfResources, cudaErrorNotSupported}) {
    if (status != none) continue;
    (void)cudaGetLastError();
    return 0;
  }
  check(status, "clusters of " + std::to_string(blocks) + " blocks");
  return clusters;
}

// How many blocks run at once on one SM of the current device. All shared memory of `kernel` is dynamic.
template <class Params>
int active_blocks(void (*kernel)(Params), int threads, int smem_bytes) {
  prepare(kernel, "active_blocks", smem_bytes);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), threads, smem_bytes),
        "blocks of " + std::to_string(threads) + " threads");
  return blocks;
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, void* stream, const Params& params) {
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(config.grid_x, config.grid_y, config.grid_z);
  launch_config.blockDim = dim3(config.threads);
  launch_config.dynamicSmemBytes = config.smem_bytes;
  launch_config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[3];
  launch_config.attrs = attributes;
  if (config.pdl) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&launch_config, kernel, params);
  if (status == cudaSuccess) return;
  check_launch(status, std::string("kernel ") + config.name + ", grid " + std::to_string(config.grid_x) + "x" +
                           std::to_string(config.grid_y) + "x" + std::to_string(config.grid_z) + ", " +
                           std::to_string(config.threads) + " threads, " + std::to_string(config.smem_bytes) +
                           " bytes of shared memory");
}

// The properties of a device that do not depend on compiled code (query_code adds the others); max_cluster is what the
// architecture allows. Callers remember the result of the ten or so attribute queries.
inline DeviceInfo query_device(int device) {
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "device " + std::to_string(device));
    return value;
  };
  DeviceInfo info{};
  info.compute_capability = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor);
  info.sm_count = get(cudaDevAttrMultiProcessorCount);
  info.smem_per_block = get(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.smem_per_sm = get(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  info.registers_per_sm = get(cudaDevAttrMaxRegistersPerMultiprocessor);
  info.threads_per_sm = get(cudaDevAttrMaxThreadsPerMultiProcessor);
  info.l2_bytes = get(cudaDevAttrL2CacheSize);
  // Two transfers a clock of so many kHz, on a bus of so many bits.
  const int64_t kilo_bytes_per_s = int64_t(2) * get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth) / 8;
  info.dram_gb_per_s = static_cast<int>(kilo_bytes_per_s / 1000000);
  info.max_cluster = !get(cudaDevAttrClusterLaunch) ? 1 : info.compute_capability >= 120 ? 8 : 16;
  return info;
}

// 1000 * major + 10 * minor of the CUDA that the driver has, or of the runtime if that is older.
inline int driver_version() {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "version of the driver");
  check(cudaRuntimeGetVersion(&runtime), "version of the runtime");
  return driver < runtime ? driver : runtime;
}

// Runs f() with the device as the current one. During a stream capture f may do what must not be captured.
template <class F>
void on_device(int device, F&& f) {
  struct Restore {
    int device = -1;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    ~Restore() {
      if (device >= 0) (void)cudaSetDevice(device);
      (void)cudaThreadExchangeStreamCaptureMode(&mode);
    }
  } before;
  check(cudaThreadExchangeStreamCaptureMode(&before.mode), "capture mode");
  check(cudaGetDevice(&before.device), "current device");
  check(cudaSetDevice(device), "device " + std::to_string(device));
  f();
}

// Adds to the info of query_device what depends on the code: compiled_for, which is arch() / 10 of the kernel's code that
// the device runs, the blocks of so many threads that run at once, and, with code for sm_90, the clusters of them. `kernel`
// uses no shared memory.
template <class Params>
void query_code(DeviceInfo& info, int device, void (*kernel)(Params), int threads) {
  on_device(device, [&] {
    cudaFuncAttributes code{};
    const cudaError_t status = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel));
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
      (void)cudaGetLastError();
      return;
    }
    check(status, "code of the kernels");
    info.compiled_for = code.ptxVersion;
    // With all shared memory a block has its SM for itself.
    info.resident_blocks = active_blocks(kernel, threads, info.smem_per_block) > 0 ? info.sm_count : -1;
    if (info.compiled_for < 90) return;
    const int largest = info.max_cluster;
    info.max_cluster = 1;
    info.active_clusters[1] = info.sm_count;
    for (int blocks = 2; blocks <= largest; ++blocks) {
      info.active_clusters[blocks] = active_clusters(kernel, blocks, threads, info.smem_per_block);
      if (info.active_clusters[blocks] > 0) info.max_cluster = blocks;
    }
  });
}

}  // namespace fused_rnn::simt
