// Matrix products outside the recurrence: gradients of the weights and of the input.
#pragma once
#include <cstdint>

#include "cpu/cpu.h"

namespace fused_rnn::cpu {

// out [M, N] = a b. a is [M, K], or [K, M] with `a_transposed`; b is [K, N]. Strides in elements from row to
// row; elements of a row are neighbours. a and b have dtype `dtype`.
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

// Whether the instruction set in use has products of bfloat16 parts that gain for this dtype, and the product is large
// enough to gain from it.
bool matmul_available(DType dtype, int64_t M, int64_t N, int64_t K);
// Returns false, with anything in out, where a or b has a value that is infinite or near it: such products need another way.
bool matmul(const MatmulParams& p, const Allocate& allocate);

// out = a b, or that added to out, on the calling thread; out has the dtype of a and b.
void small_matmul(const MatmulParams& p, bool add, const Allocate& allocate);
// Whether such a product takes less time so than by a library, which has threads to wake.
bool small_matmul_available(DType dtype, int64_t M, int64_t N, int64_t K);

}  // namespace fused_rnn::cpu
