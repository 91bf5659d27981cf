// Stand-in for torch's header. The handle's mode follows torch's switch for matrix products, as torch sets it.
#pragma once
#include <cublas_v2.h>

struct cudaDeviceProp {
  int major;
};

namespace at::cuda {
cudaDeviceProp* getCurrentDeviceProperties();
cublasHandle_t getCurrentCUDABlasHandle();
}  // namespace at::cuda
