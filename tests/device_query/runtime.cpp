// The calls of the CUDA runtime that asking a device takes, for a device that is made up: see main.cu.
#include "runtime.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

MadeUp made_up;

namespace {

int current = 3, smem = 48 << 10, large_clusters = 0;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
cudaError_t last = cudaSuccess;

void demand(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}
cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) last = status;
  return status;
}
// Of what must be asked of the right device, and is not allowed while a stream is being captured.
void demand_scope() {
  demand(current == made_up.device, "asks another device");
  demand(mode == cudaStreamCaptureModeRelaxed, "would end a capture");
}

}  // namespace

bool as_before() { return current == 3 && mode == cudaStreamCaptureModeGlobal && last == cudaSuccess; }

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  current = device;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  const cudaStreamCaptureMode before = mode;
  mode = *other;
  *other = before;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t status = last;
  last = cudaSuccess;
  return status;
}
const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "made-up error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  demand(device == made_up.device, "asks another device");
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = made_up.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = made_up.capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrClusterLaunch: *value = made_up.capability >= 90; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  demand_scope();
  if (made_up.compiled_for == 0) return result(cudaErrorNoKernelImageForDevice);
  *attributes = {};
  attributes->ptxVersion = made_up.compiled_for;
  attributes->maxDynamicSharedSizeBytes = smem;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  demand_scope();
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) smem = value;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) large_clusters = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  demand_scope();
  demand(config->numAttrs == 1 && config->attrs[0].id == cudaLaunchAttributeClusterDimension, "no cluster is asked for");
  const int blocks = config->attrs[0].val.clusterDim.x;
  demand(config->gridDim.x % blocks == 0 && config->blockDim.x == 256, "not a grid of such clusters");
  demand(config->dynamicSmemBytes == 227 << 10 && smem == 227 << 10, "blocks do not have an SM each");
  demand(blocks <= 8 || large_clusters, "larger clusters than the portable ones have not been allowed");
  *clusters = 0;
  if (blocks == made_up.none) return cudaSuccess;
  if (blocks > made_up.largest) return result(static_cast<cudaError_t>(made_up.error));
  *clusters = 120 / blocks;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t bytes) {
  demand_scope();
  demand(threads == 256 && bytes == 227 << 10 && smem == 227 << 10, "blocks do not have an SM each");
  *blocks = made_up.fits;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

// What nvcc's code for the host calls to make a kernel known.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(void*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorUnknown; }
}
