// What the stand-in for cuBLAS (torch_host/cublas.cpp) asks of the simulated device, once it has checked a call's arguments.
#pragma once
#include <cstdint>

namespace simt_host {

enum class GemmType { kFp64, kFp32, kFp16, kBf16 };

// C [m, n] = alpha op(A) [m, k] op(B) [k, n] + beta C, column by column in memory, as BLAS has matrices: element (i, j) of a
// stored matrix is at i + j ld. Where beta is 0, C is not read.
struct GemmEx {
  GemmType inputs, result;
  bool tf32;  // the factors are rounded to 10 bits of mantissa
  bool a_transposed, b_transposed;
  int64_t m, n, k, lda, ldb, ldc;
  double alpha, beta;
  const void* a;
  const void* b;
  void* c;
};

}  // namespace simt_host
