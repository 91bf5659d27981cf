// Matrix products outside the recurrence: gradients of the weights and of the input.
#pragma once
#include <cstdint>

#include "cpu/cpu.h"

namespace fused_rnn::cpu {

// out [M, N] = a b. a is [M, K], or [K, M] where `a_transposed`; b is [K, N]. Strides count elements from row to row; the
// elements of a row are neighbours. a and b have dtype `dtype`.
struct MatmulParams {
  DType dtype;
  int64_t M, N, K;
  const void* a;
  int64_t a_stride;
  bool a_transposed;
  const void* b;
  int64_t b_stride;
  void* out;
  int64_t out_stride;
  DType out_dtype;  // float, or as dtype
};

// Whether the instruction set in use has products in bfloat16 parts that gain for this dtype, and the product is large
// enough to gain from them.
bool matmul_available(DType dtype, int64_t M, int64_t N, int64_t K);
// Returns false where a or b has a value without parts (infinite, NaN, or rounded to infinity): out then holds nothing of
// use, and the caller makes the product in another way.
bool matmul(const MatmulParams& p, const Allocate& allocate);

// out = a b, or out += a b with `add`, on the calling thread; out has the dtype of a and b.
void small_matmul(const MatmulParams& p, bool add, const Allocate& allocate);
// Whether small_matmul takes less time than a library, which has threads to wake.
bool small_matmul_available(DType dtype, int64_t M, int64_t N, int64_t K);

}  // namespace fused_rnn::cpu
