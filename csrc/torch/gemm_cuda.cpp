// The products of family `gemm` by cuBLAS, on torch's handle. Its workspace belongs to the thread and the stream: a graph
// can capture the products, and the same call on the same device has the same bits.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>

#include "cuda/backend.h"
#include "cuda/library_product.h"

namespace fused_rnn {
namespace {

struct GemmTypes {
  cudaDataType_t storage, sums;
  cublasComputeType_t compute;
};

GemmTypes gemm_types(cuda::MathKind math) {
  switch (math) {
    case cuda::MathKind::kFp64: return {CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F};
    case cuda::MathKind::kFp32: return {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    case cuda::MathKind::kTf32: return {CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32};
    case cuda::MathKind::kFp16: return {CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F};
    case cuda::MathKind::kBf16: return {CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F};
  }
  return {};
}

void product_by_cublas(const cuda::LibraryProduct& p, void* stream) {
  TORCH_INTERNAL_ASSERT(c10::cuda::getCurrentCUDAStream().stream() == stream, "family gemm runs on torch's stream");
  // The handle's mode follows torch's switch for matrix products, which is not that of recurrent layers.
  const at::NoTF32Guard by_type_alone;
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  const GemmTypes types = gemm_types(p.math);
  const bool is_double = p.math == cuda::MathKind::kFp64;
  const double one_double = 1, zero_double = 0;
  const float one_float = 1, zero_float = 0;
  const void* const one = is_double ? static_cast<const void*>(&one_double) : &one_float;
  const void* const zero = is_double ? static_cast<const void*>(&zero_double) : &zero_float;
  // cuBLAS counts rows first: out^T = b^T a^T
  const cublasStatus_t status =
      cublasGemmEx_64(handle, p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, p.columns, p.rows, p.inner, one, p.b,
                      types.storage, p.b_transposed ? p.inner : p.columns, p.a, types.storage, p.a_stride, zero, p.out,
                      types.sums, p.columns, types.compute, CUBLAS_GEMM_DEFAULT);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH) {
    throw LaunchRefused("cuBLAS has no such product for the device");  // the next family writes all results anew
  }
  TORCH_CUDABLAS_CHECK(status);
}

[[maybe_unused]] const bool product_is_installed = (cuda::set_library_product(product_by_cublas), true);

}  // namespace
}  // namespace fused_rnn
