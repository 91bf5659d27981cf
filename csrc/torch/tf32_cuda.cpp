#include "torch/tf32_cuda.h"

#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/Exceptions.h>
#include <cublas_v2.h>

#include <algorithm>

namespace fused_rnn {
namespace {

// A matrix as cuBLAS sees it. cuBLAS counts rows first: to it, a matrix whose columns are neighbours is the transpose.
struct Operand {
  at::Tensor owner;
  const float* data;
  cublasOperation_t operation;
  int64_t stride;

  explicit Operand(const at::Tensor& t) : owner(t) {
    if (!describe()) {
      owner = t.contiguous();
      TORCH_INTERNAL_ASSERT(describe());
    }
    data = owner.const_data_ptr<float>();
  }

 private:
  // False if neither rows nor columns are neighbours. The stride of a dimension of size 1 means nothing.
  bool describe() {
    const int64_t rows = owner.size(0), columns = owner.size(1);
    if (columns == 1 || owner.stride(1) == 1) {
      operation = CUBLAS_OP_N;
      stride = rows == 1 ? columns : owner.stride(0);
      if (stride >= columns) return true;
    }
    if (rows == 1 || owner.stride(0) == 1) {
      operation = CUBLAS_OP_T;
      stride = columns == 1 ? rows : owner.stride(1);
      if (stride >= rows) return true;
    }
    return false;
  }
};

}  // namespace

bool device_has_tf32() { return at::cuda::getCurrentDeviceProperties()->major >= 8; }

void multiply_tf32(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  if (M == 0 || N == 0) return;
  if (K == 0) {
    if (!add) out.zero_();
    return;
  }
  const Operand left(a), right(b);
  const float one = 1, beta = add ? 1 : 0;
  // out^T = b^T a^T
  TORCH_CUDABLAS_CHECK(cublasGemmEx_64(at::cuda::getCurrentCUDABlasHandle(), right.operation, left.operation, N, M, K, &one,
                                       right.data, CUDA_R_32F, right.stride, left.data, CUDA_R_32F, left.stride, &beta,
                                       out.data_ptr<float>(), CUDA_R_32F, M == 1 ? N : out.stride(0),
                                       CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
}

}  // namespace fused_rnn
