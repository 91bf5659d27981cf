// Products of a matrix with one-hot rows, which are never made: a row's number (its id) says which column of the matrix is
// the product. Letters: N rows, I ids, C columns of the products.
#pragma once
#include <cstdint>

#include "cpu/cpu.h"

namespace fused_rnn::cpu {

// out[n] = w[:, ids[n]]
struct GatherParams {
  DType dtype;
  int64_t N, I, C;
  const int64_t* ids;  // [N], each below I; negative: the row takes no part, and nothing is written
  const void* w;       // [C, I]
  void* out;           // [N] rows of [C]
  int64_t out_stride;  // elements from row to row
};
// Results are copies, whatever the number of threads.
void gather_columns(const GatherParams& p, const Allocate& allocate);

// dw[c, i] = sum of d[n, c] over the rows n with ids[n] == i, in the order of n, which makes it the same sum in every call
// and for every number of threads. 16-bit sums are made in float and rounded once.
struct ScatterParams {
  DType dtype;
  int64_t N, I, C;
  const int64_t* ids;  // [N], as above
  const void* d;       // [N] rows of [C]
  int64_t d_stride;    // elements from row to row
  void* dw;            // [C, I]
};
void scatter_columns(const ScatterParams& p, const Allocate& allocate);

}  // namespace fused_rnn::cpu
