// Matrix products and sums of a layer outside its scan, on a CPU or by torch.
#pragma once
#include <ATen/core/Tensor.h>

namespace fused_rnn {

using at::Tensor;

// out [M, N] = a^T b (a is [K, M]) or a b, or that added to out. The columns of a and b are neighbours in memory.
void multiply_into(const Tensor& out, const Tensor& a, bool transposed, const Tensor& b, bool add);
// out [columns] = the sums of the columns of a [rows, columns], or these added to out. out may be float where a has 16 bits,
// also in multiply_into.
void sum_rows_into(const Tensor& out, const Tensor& a, bool add = false);

}  // namespace fused_rnn
