#include "torch/products.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <cstring>

#include "cpu/gemm/matmul.h"
#include "torch/device.h"
#include "torch/tensors.h"
#include "torch/workspace.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/ops_cuda.h"
#include "torch/tf32_cuda.h"
#endif

namespace fused_rnn {
namespace {

// Sums over up to this many rows and elements are made here on a CPU: torch's dispatch takes longer than these loops.
constexpr int64_t kFewRows = 64, kFewElements = 8 * 1024;

bool is_small_sum(const Tensor& out, const Tensor& a) {
  const auto type = a.scalar_type();
  return a.is_cpu() && out.scalar_type() == type && (type == at::kFloat || type == at::kDouble) && a.size(0) <= kFewRows &&
         a.numel() <= kFewElements && a.stride(1) == 1 && out.is_contiguous();
}

// Adds the sums of the columns of a [rows, columns] to out [columns].
template <class A>
void add_rows(const Tensor& out, const Tensor& a) {
  A* to = out.data_ptr<A>();
  for (int64_t k = 0; k < a.size(0); ++k) {
    const A* row = a.const_data_ptr<A>() + k * a.stride(0);
    for (int64_t n = 0; n < out.size(0); ++n) to[n] += row[n];
  }
}

// multiply_into in float: converts a and b (transposed), or a and out, some rows at a time.
void multiply_in_float(const Tensor& out, const Tensor& a, bool transposed, const Tensor& b, bool add) {
  constexpr int64_t kElements = 1 << 18, kFewestRows = 512;
  const int64_t rows = a.size(0), step = std::max(kElements / (a.size(1) + b.size(1)), kFewestRows);
  const auto options = out.options().dtype(at::kFloat);
  const auto save = [&](const Tensor& to, const Tensor& sums) { add ? to.add_(sums) : to.copy_(sums); };
  Tensor sums = transposed ? at::empty({a.size(1), b.size(1)}, options) : Tensor();
  const Tensor right = transposed ? Tensor() : b.to(at::kFloat);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    const Tensor left = a.narrow(0, begin, count).to(at::kFloat);
    if (!transposed) {
      save(out.narrow(0, begin, count), at::mm(left, right));
    } else if (begin == 0) {
      at::mm_out(sums, left.t(), b.narrow(0, begin, count).to(at::kFloat));
    } else {
      sums.addmm_(left.t(), b.narrow(0, begin, count).to(at::kFloat));
    }
  }
  if (transposed) save(out, sums);
}

}  // namespace

void sum_rows_into(const Tensor& out, const Tensor& a, bool add) {
  if (!is_small_sum(out, a)) {
    Tensor target = add ? at::empty_like(out) : out;
    at::sum_out(target, a, {0}, /*keepdim=*/false, target.scalar_type());
    if (add) out.add_(target);
    return;
  }
  if (!add) std::memset(out.data_ptr(), 0, out.nbytes());
  a.scalar_type() == at::kFloat ? add_rows<float>(out, a) : add_rows<double>(out, a);
}

void multiply_into(const Tensor& out, const Tensor& a, bool transposed, const Tensor& b, bool add) {
  const int64_t M = out.size(0), N = b.size(1), K = b.size(0);
  if (M == 0 || N == 0 || K == 0) {
    if (!add) out.zero_();
    return;
  }
#ifdef FUSED_RNN_WITH_CUDA
  // MatmulPrecision may hold to float what torch's switch allows.
  const bool tf32 = is_on_device(out) && !at::NoTF32Guard::should_disable_tf32() && allows_tf32(out) && device_has_tf32();
  if (tf32) return multiply_tf32(out, transposed ? a.t() : a, b, add);
#endif
  if (out.is_cpu() && out.stride(1) == 1 && a.stride(1) == 1 && b.stride(1) == 1) {
    const DType dtype = dtype_of(a);
    const auto call = [&](const Tensor& to) {
      cpu::MatmulParams p{};
      p.dtype = dtype;
      p.M = M, p.N = N, p.K = K;
      p.a = a.const_data_ptr(), p.a_stride = a.stride(0), p.a_transposed = transposed;
      p.b = b.const_data_ptr(), p.b_stride = b.stride(0);
      p.out = to.data_ptr(), p.out_stride = to.stride(0), p.out_dtype = dtype_of(to);
      return p;
    };
    Workspace workspace;
    const auto allocate = [&](int64_t bytes) { return workspace.take(bytes); };
    if (cpu::matmul_available(dtype, M, N, K)) {
      const Tensor to = add ? at::empty({M, N}, out.options().dtype(at::kFloat)) : out;
      if (cpu::matmul(call(to), allocate)) {
        if (add) out.add_(to);
        return;
      }
    } else if (dtype_of(out) == dtype && cpu::small_matmul_available(dtype, M, N, K)) {
      cpu::small_matmul(call(out), add, allocate);
      return;
    }
  }
  // A library's product of 16 bits may spread the NaN of one row to its neighbours: oneDNN's of bfloat16 does where its
  // blocks do not divide K.
  if (out.is_cpu() && a.element_size() == 2) return multiply_in_float(out, a, transposed, b, add);
  const Tensor left = transposed ? a.t() : a;
  if (add) {
    out.addmm_(left, b);
  } else {
    Tensor target = out;
    at::mm_out(target, left, b);
  }
}

}  // namespace fused_rnn
