// Stand-in for cuBLAS: csrc/torch/gemm_cuda.cpp and tf32_cuda.cpp run unchanged against it. It follows the contract of
// cublasGemmEx in NVIDIA's documentation: what it refuses and with which status, matrices column by column, alpha and beta
// in the type that the computation scales by, C not read where beta is 0. The product itself runs on the simulated device
// (../kernels/cublas.cu), in double, behind what was launched before. What cuBLAS itself does is left to a GPU.
#include "cublas.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../kernels/gemm_ex.h"
#include "c10/cuda/CUDAStream.h"
#include "cuda/library_product.h"

// Of torch: scalars lie on the host.
struct cublasContext {
  void* stream;
  bool tf32;  // CUBLAS_TF32_TENSOR_OP_MATH, else CUBLAS_DEFAULT_MATH
};

namespace {

using simt_host::GemmEx;
using simt_host::GemmType;

template <class F>
F* symbol(const char* name) {
  static void* const library = dlopen(std::getenv("FUSED_RNN_SIMT_LIBRARY"), RTLD_NOW);
  return reinterpret_cast<F*>(library ? dlsym(library, name) : nullptr);
}

cudaDeviceProp properties{9};
std::optional<cublasStatus_t> injected;  // what calls return, for tests
int tf32_count = 0, library_count = 0;
bool is_inside = false;     // of a call of the simulator's backend, whose launches wait for its end
std::exception_ptr raised;  // by a product inside of such a call
fused_rnn::cuda::LibraryProductFunction installed = nullptr;

GemmType type_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_64F: return GemmType::kFp64;
    case CUDA_R_32F: return GemmType::kFp32;
    case CUDA_R_16F: return GemmType::kFp16;
    case CUDA_R_16BF: return GemmType::kBf16;
  }
  throw std::logic_error("no such type");
}

// The rows of cublasGemmEx's table of types that have no complex numbers and no integers.
bool is_supported(cublasComputeType_t compute, cudaDataType_t a, cudaDataType_t b, cudaDataType_t c) {
  if (a != b) return false;
  switch (compute) {
    case CUBLAS_COMPUTE_16F:
    case CUBLAS_COMPUTE_16F_PEDANTIC: return a == CUDA_R_16F && c == CUDA_R_16F;
    case CUBLAS_COMPUTE_32F:
    case CUBLAS_COMPUTE_32F_PEDANTIC: return a != CUDA_R_64F && (c == CUDA_R_32F || c == a);
    case CUBLAS_COMPUTE_64F:
    case CUBLAS_COMPUTE_64F_PEDANTIC: return a == CUDA_R_64F && c == CUDA_R_64F;
    case CUBLAS_COMPUTE_32F_FAST_16F:
    case CUBLAS_COMPUTE_32F_FAST_16BF:
    case CUBLAS_COMPUTE_32F_FAST_TF32: return a == CUDA_R_32F && c == CUDA_R_32F;
  }
  return false;
}

// Bytes of a stored matrix, from its first element to its last.
int64_t extent(int64_t rows, int64_t columns, int64_t ld, GemmType type) {
  const int64_t size = type == GemmType::kFp64 ? 8 : type == GemmType::kFp32 ? 4 : 2;
  return rows && columns ? ((columns - 1) * ld + rows) * size : 0;
}

bool overlap(const void* a, int64_t bytes, const void* b, int64_t more) {
  const auto* const first = static_cast<const char*>(a);
  const auto* const second = static_cast<const char*>(b);
  return first < second + more && second < first + bytes;
}

void product_inside(const fused_rnn::cuda::LibraryProduct& product, void* stream) {
  ++library_count;
  is_inside = true;
  try {
    installed(product, stream);
  } catch (...) {  // the library of the simulator knows no types of ours
    is_inside = false;
    raised = std::current_exception();
    throw std::runtime_error("a product has raised");
  }
  is_inside = false;
}

}  // namespace

cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int64_t m,
                               int64_t n, int64_t k, const void* alpha, const void* A, cudaDataType_t Atype, int64_t lda,
                               const void* B, cudaDataType_t Btype, int64_t ldb, const void* beta, void* C,
                               cudaDataType_t Ctype, int64_t ldc, cublasComputeType_t computeType, cublasGemmAlgo_t algo) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (injected) return *injected;
  const bool a_transposed = transa != CUBLAS_OP_N, b_transposed = transb != CUBLAS_OP_N;
  const int64_t one = 1, a_rows = a_transposed ? k : m, b_rows = b_transposed ? n : k;
  if (m < 0 || n < 0 || k < 0 || lda < std::max(one, a_rows) || ldb < std::max(one, b_rows) || ldc < std::max(one, m) ||
      !alpha || !beta || !C) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (algo != CUBLAS_GEMM_DEFAULT || !is_supported(computeType, Atype, Btype, Ctype)) return CUBLAS_STATUS_NOT_SUPPORTED;
  // Scalars are of the type that the computation scales by.
  const bool is_double = Atype == CUDA_R_64F;
  const auto scalar = [&](const void* p) {
    return is_double ? *static_cast<const double*>(p) : *static_cast<const float*>(p);
  };
  const bool tf32 = Atype == CUDA_R_32F &&
                    (computeType == CUBLAS_COMPUTE_32F_FAST_TF32 || (computeType == CUBLAS_COMPUTE_32F && handle->tf32));
  tf32_count += tf32;
  const GemmEx call{type_of(Atype),
                    type_of(Ctype),
                    tf32,
                    a_transposed,
                    b_transposed,
                    m,
                    n,
                    k,
                    lda,
                    ldb,
                    ldc,
                    scalar(alpha),
                    scalar(beta),
                    A,
                    B,
                    C};
  const int64_t c_bytes = extent(m, n, ldc, call.result);
  if (overlap(C, c_bytes, A, extent(a_rows, a_transposed ? m : k, lda, call.inputs)) ||
      overlap(C, c_bytes, B, extent(b_rows, b_transposed ? k : n, ldb, call.inputs))) {
    throw std::logic_error("cublasGemmEx: the result overlaps a factor");
  }
  if (handle->stream) throw std::logic_error("cublasGemmEx: the simulated device has one stream");
  if (is_inside) {
    symbol<void(const GemmEx*)>("simt_gemm_ex")(&call);
    return CUBLAS_STATUS_SUCCESS;
  }
  if (symbol<int(const GemmEx*)>("simt_gemm_ex_alone")(&call)) {
    const auto text = [](const char* name) { return std::string(symbol<const char*()>(name)()); };
    throw std::runtime_error(text("simt_kind") + ": " + text("simt_message"));
  }
  return CUBLAS_STATUS_SUCCESS;
}

namespace at::cuda {

cudaDeviceProp* getCurrentDeviceProperties() { return &properties; }

cublasHandle_t getCurrentCUDABlasHandle() {
  static cublasContext handle;
  const auto allowed = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  const bool tf32 = !at::NoTF32Guard::should_disable_tf32() && allowed == at::Float32Precision::TF32;
  handle = {c10::cuda::getCurrentCUDAStream().stream(), tf32};
  return &handle;
}

}  // namespace at::cuda

namespace fused_rnn::cuda {

void set_library_product(LibraryProductFunction function) {
  installed = function;
  if (auto* const set = symbol<void(LibraryProductFunction)>("simt_set_library_product")) set(product_inside);
}

LibraryProductFunction library_product() { return installed; }

void rethrow_of_product() {
  if (raised) std::rethrow_exception(std::exchange(raised, nullptr));
}

}  // namespace fused_rnn::cuda

// How many products have rounded their factors to TF32.
extern "C" __attribute__((visibility("default"))) int torch_host_tf32_products() { return tf32_count; }
// How many products family `gemm` has asked for.
extern "C" __attribute__((visibility("default"))) int torch_host_library_products() { return library_count; }
// From now on every call returns this status, 0: its own. The device's compute capability is `major`.x.
extern "C" __attribute__((visibility("default"))) void torch_host_cublas(int status, int major) {
  injected = status ? std::optional(static_cast<cublasStatus_t>(status)) : std::nullopt;
  properties.major = major;
}
