// Matrix products around the recurrence in TF32. torch has a switch for matrix products and another one for recurrent
// layers, and by default only the latter allows TF32. cuDNN's products of a recurrent layer follow the latter, and so do
// these, whose arithmetic is an argument: no switch that other threads see is touched.
#pragma once
#include <ATen/core/Tensor.h>

namespace fused_rnn {

// Whether the current device has TF32.
bool device_has_tf32();

// out [M, N] = a [M, K] b [K, N], or that added to out, on the current stream; float. The columns of out are neighbours in
// memory; a and b may have any strides.
void multiply_tf32(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add);

}  // namespace fused_rnn
