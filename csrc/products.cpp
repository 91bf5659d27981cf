#include "products.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>
#include <functional>
#include <initializer_list>

#include "cpu/matmul.h"
#include "layer.h"
#include "workspace.h"

namespace fused_rnn {
namespace {

// Up to this many rows the sums over rows are made here on a CPU: torch's dispatch takes longer than these loops.
constexpr int64_t kFewRows = 8;

// Whether the sums over the rows of all of these are made here.
bool has_few_rows(std::initializer_list<std::reference_wrapper<const Tensor>> tensors, int64_t rows) {
  return rows <= kFewRows && std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
           const auto type = t.scalar_type();
           return t.is_cpu() && t.stride(-1) == 1 && (type == at::kFloat || type == at::kDouble);
         });
}

// out[m] = sum_k a[k][m] b[k], or that added to out.
template <class A>
void add_outer_products(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  const A *from_a = a.const_data_ptr<A>(), *from_b = b.const_data_ptr<A>();
  const int64_t rows = a.size(0), columns = b.size(1);
  for (int64_t m = 0; m < out.size(0); ++m) {
    A* to = out.data_ptr<A>() + m * out.stride(0);
    if (!add) std::fill_n(to, columns, A(0));
    for (int64_t k = 0; k < rows; ++k) {
      const A factor = from_a[k * a.stride(0) + m];
      const A* row = from_b + k * b.stride(0);
      for (int64_t n = 0; n < columns; ++n) to[n] += factor * row[n];
    }
  }
}

// The sums of the columns of a [rows, columns] into out [columns].
template <class A>
void add_rows(const Tensor& out, const Tensor& a) {
  A* to = out.data_ptr<A>();
  std::fill_n(to, out.size(0), A(0));
  for (int64_t k = 0; k < a.size(0); ++k) {
    const A* row = a.const_data_ptr<A>() + k * a.stride(0);
    for (int64_t n = 0; n < out.size(0); ++n) to[n] += row[n];
  }
}

// The same as multiply_into, in float: some rows of a and b (transposed) or of a and out are converted at a time.
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

void sum_rows_into(const Tensor& out, const Tensor& a) {
  if (!has_few_rows({out, a}, a.size(0))) {
    Tensor target = out;
    at::sum_out(target, a, {0});
  } else if (a.scalar_type() == at::kFloat) {
    add_rows<float>(out, a);
  } else {
    add_rows<double>(out, a);
  }
}

void multiply_into(const Tensor& out, const Tensor& a, bool transposed, const Tensor& b, bool add) {
  if (transposed && has_few_rows({out, a, b}, a.size(0))) {
    return a.scalar_type() == at::kFloat ? add_outer_products<float>(out, a, b, add)
                                         : add_outer_products<double>(out, a, b, add);
  }
  const Tensor left = transposed ? a.t() : a;
  const int64_t M = left.size(0), N = b.size(1), K = left.size(1);
  const bool rows = out.stride(1) == 1 && a.stride(1) == 1 && b.stride(1) == 1;
  if (out.is_cpu() && rows && cpu::matmul_available(dtype_of(a), M, N, K)) {
    const Tensor to = add ? at::empty({M, N}, out.options().dtype(at::kFloat)) : out;
    const cpu::MatmulParams p{dtype_of(a),
                              M,
                              N,
                              K,
                              a.const_data_ptr(),
                              a.stride(0),
                              transposed,
                              b.const_data_ptr(),
                              b.stride(0),
                              to.data_ptr(),
                              to.stride(0),
                              dtype_of(to)};
    Workspace workspace;
    if (cpu::matmul(p, [&](int64_t bytes) { return workspace.take(bytes); })) {
      if (add) out.add_(to);
      return;
    }
  }
  if (out.is_cpu() && cpu::matmul_in_float(dtype_of(a), M, N, K)) return multiply_in_float(out, a, transposed, b, add);
  if (add) {
    out.addmm_(left, b);
  } else {
    Tensor target = out;
    at::mm_out(target, left, b);
  }
}

}  // namespace fused_rnn
