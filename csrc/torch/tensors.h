// Tensors and the memory that kernels see.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/params.h"

namespace fused_rnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises for a dtype that no kernel has.
DType dtype_of(const Tensor& x);

// Uninitialised memory like x's; on a CPU without the dispatcher, whose share of a small step would be a tenth.
Tensor empty_like(const Tensor& x, at::IntArrayRef shape);
// The same for what only this library reads.
Tensor empty_inside(const Tensor& x, at::IntArrayRef shape);

// Rows or columns [begin, end) of a matrix.
inline Tensor part(const Tensor& t, int64_t dim, int64_t begin, int64_t end) {
  return begin == 0 && end == t.size(dim) ? t : t.slice(dim, begin, end);
}

inline void* data_or_null(const Tensor& t) { return t.defined() && t.numel() ? t.data_ptr() : nullptr; }

// Copies of tensors that were not contiguous, for as long as a call needs them.
class Copies {
 public:
  // Contiguous memory of t; null where there is no tensor.
  const void* contiguous(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    copies_.push_back(t.contiguous());
    return copies_.back().const_data_ptr();
  }
  const void* contiguous(const OptionalTensor& t) { return t && t->defined() ? contiguous(*t) : nullptr; }
  const void* contiguous(const Tensor* t) { return t ? contiguous(*t) : nullptr; }
  // The same in another dtype.
  const void* contiguous(const Tensor* t, at::ScalarType dtype) {
    return !t || t->scalar_type() == dtype ? contiguous(t) : keep(t->to(dtype).contiguous());
  }
  // Memory of a tensor that the call is to own.
  const void* keep(Tensor t) {
    copies_.push_back(std::move(t));
    return copies_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> copies_;
};

}  // namespace fused_rnn
