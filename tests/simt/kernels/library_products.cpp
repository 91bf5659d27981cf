// The products by cuBLAS of csrc/torch, alone, for ctypes: those of gemm_cuda.cpp and tf32_cuda.cpp, against the stand-in
// for cuBLAS of torch_host. Memory is the simulated device's.
#include <ATen/ops/from_blob.h>

#include <string>

#include "cublas.h"
#include "cuda/device/refused.h"
#include "torch/tf32_cuda.h"

namespace {

std::string message;

// 0; 1: the launch was refused; 2: another exception.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const fused_rnn::LaunchRefused& error) {
    message = error.what();
    return 1;
  } catch (const std::exception& error) {
    message = error.what();
    return 2;
  }
}

at::Tensor matrix(void* data, const int64_t* sizes, const int64_t* strides) {
  return at::from_blob(data, {sizes[0], sizes[1]}, {strides[0], strides[1]}, at::kFloat);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* harness_message() { return message.c_str(); }

EXPORT int harness_product(const fused_rnn::cuda::LibraryProduct* product, void* stream) {
  return guarded([&] { fused_rnn::cuda::library_product()(*product, stream); });
}

// sizes: M, N, K; strides: of out, a and b.
EXPORT int harness_tf32(void* out, void* a, void* b, const int64_t* sizes, const int64_t* strides, bool add) {
  return guarded([&] {
    const int64_t M = sizes[0], N = sizes[1], K = sizes[2];
    const int64_t of_out[] = {M, N}, of_a[] = {M, K}, of_b[] = {K, N};
    fused_rnn::multiply_tf32(matrix(out, of_out, strides), matrix(a, of_a, strides + 2), matrix(b, of_b, strides + 4), add);
  });
}

EXPORT bool harness_has_tf32() { return fused_rnn::device_has_tf32(); }
