// Ids in place of one-hot rows: the input product of a layer is a gather of columns of W_ih, and the gradient of W_ih a
// scatter of columns.
#pragma once
#include "torch/layer.h"

namespace fused_rnn {

// The ids of a call's rows [N], which may be read as they are: on a CPU -1 at rows that take no part, and IndexError where
// one of the others is no column's; on a GPU, where looking would wait for the device, an id beyond the ends is the first or
// the last column's.
Tensor ids_of_rows(const Call& call, const LayerShapes& s);
// The same for a layer whose sequence and number of columns (I) are known.
Tensor ids_of_rows(const Call& call, const Sequence& seq, int64_t columns);

// Writes the columns w[:, ids] of w [C, I] to the rows of out [N, C]; rows that take no part are left as they are.
void gather_columns_into(const Tensor& out, const Tensor& w, const Tensor& ids);
// dw [C, I] from d [N, C]: the sums of the rows of each id, the same bits in every call.
void scatter_columns_into(const Tensor& dw, const Tensor& d, const Tensor& ids);

// The input product of a call on a CPU, for the scan to read (ForwardParams::columns).
void gather_input_product(const Call& call, ForwardCall& made);

}  // namespace fused_rnn
