// FUSED_RNN_HD: a function for the host and, in CUDA code, for the device.
#pragma once

#ifdef __CUDACC__
#define FUSED_RNN_HD __host__ __device__ __forceinline__
#else
#define FUSED_RNN_HD inline
#endif
