// In place of csrc/torch/tf32_cuda.cpp: products of float matrices whose elements are rounded to TF32's 10 bits of mantissa.
#include "torch/tf32_cuda.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mm.h>

namespace fused_rnn {
namespace {

int tf32_products = 0;

at::Tensor rounded(const at::Tensor& t) {
  at::Tensor bits = t.contiguous().clone().view(at::kInt);
  return bits.add_(1 << 12).bitwise_and_(~((1 << 13) - 1)).view(at::kFloat);
}

}  // namespace

bool device_has_tf32() { return true; }

void multiply_tf32(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  ++tf32_products;
  const at::Tensor product = at::mm(rounded(a), rounded(b));
  add ? out.add_(product) : out.copy_(product);
}

}  // namespace fused_rnn

// How many products there have been.
extern "C" __attribute__((visibility("default"))) int torch_host_tf32_products() { return fused_rnn::tf32_products; }
