// The matrix products of family `gemm`, which a library makes: who makes them is installed here. csrc/torch installs
// cuBLAS; the simulator and the torch-free program a plain kernel.
#pragma once
#include <cstdint>

#include "plan/math_kind.h"

namespace fused_rnn::cuda {

// out [rows, columns] = a [rows, inner] b, where a and b are in the storage type of `math` and out is in its arithmetic
// type. Rows of out depend on nothing but the rows of a of the same number, and b.
struct LibraryProduct {
  MathKind math;
  int64_t rows, columns, inner;
  const void* a;  // a_stride elements from row to row
  int64_t a_stride;
  const void* b;  // [inner, columns], or [columns, inner] where b_transposed; contiguous
  bool b_transposed;
  void* out;  // contiguous
};

// Makes the product on a stream, synchronises nothing, and may be captured in a graph.
using LibraryProductFunction = void (*)(const LibraryProduct& product, void* stream);

void set_library_product(LibraryProductFunction function);

}  // namespace fused_rnn::cuda
