#include "torch/tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include "torch/memory.h"

namespace fused_rnn {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, "input: expected dtype float64, float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

Tensor empty_like(const Tensor& x, at::IntArrayRef shape) {
  return x.is_cpu() ? Tensor(at::detail::empty_cpu(shape, x.scalar_type())) : at::empty(shape, x.options());
}

Tensor empty_inside(const Tensor& x, at::IntArrayRef shape) {
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(x.element_size());
  return x.is_cpu() && bytes >= MemoryPool::kLeast ? MemoryPool::empty(shape, x.scalar_type(), bytes) : empty_like(x, shape);
}

}  // namespace fused_rnn
