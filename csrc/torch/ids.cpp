#include "torch/ids.h"

#include <ATen/ops/clamp.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>

#include "cpu/gemm/columns.h"
#include "torch/device.h"
#include "torch/workspace.h"

namespace fused_rnn {
namespace {

// Raises for the id of time step t of batch row b.
void refuse(const Call& call, int64_t id, int64_t t, int64_t b, int64_t columns) {
  const std::string at = call.rows.offsets ? "packed row " : "time step ";
  const int64_t place = call.rows.offsets ? b : t;
  TORCH_CHECK_INDEX(false, "input: expected ids from 0 to ", columns - 1, " (input_size - 1), got ", id, " at ", at, place,
                    call.rows.offsets ? std::string() : " of batch row " + std::to_string(b));
}

}  // namespace

Tensor ids_of_rows(const Call& call, const Sequence& seq, int64_t columns) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(call.x)) {
    TORCH_CHECK_INDEX(columns > 0 || seq.N == 0, "input: expected no ids where input_size is 0");
    return at::clamp(call.x, 0, columns - 1).reshape({seq.N});
  }
#endif
  const Tensor given = call.x.contiguous();
  Tensor ids = at::empty({seq.N}, given.options());
  const int64_t* const from = given.const_data_ptr<int64_t>();
  int64_t* const to = ids.data_ptr<int64_t>();
  for (int64_t n = 0; n < seq.N; ++n) {
    const int64_t t = seq.offsets ? 0 : n / seq.B, b = seq.offsets ? n : n % seq.B;
    const bool active = !seq.lengths || t < seq.lengths[b];
    const int64_t id = from[n];  // read once: another thread may write
    if (active && (id < 0 || id >= columns)) refuse(call, id, t, b, columns);
    to[n] = active ? id : -1;
  }
  return ids;
}

Tensor ids_of_rows(const Call& call, const LayerShapes& s) {
  Copies copies;
  return ids_of_rows(call, sequence_of(call, s, copies), s.I);
}

void gather_columns_into(const Tensor& out, const Tensor& w, const Tensor& ids) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(out)) {
    Tensor target = out;
    target.copy_(w.t().index_select(0, ids));
    return;
  }
#endif
  const Tensor of = w.contiguous();
  Workspace workspace;
  cpu::gather_columns({dtype_of(of), ids.size(0), of.size(1), of.size(0), ids.const_data_ptr<int64_t>(), of.const_data_ptr(),
                       out.data_ptr(), out.stride(0)},
                      [&](int64_t bytes) { return workspace.take(bytes); });
}

void scatter_columns_into(const Tensor& dw, const Tensor& d, const Tensor& ids) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(dw)) {
    dw.copy_(at::embedding_dense_backward(d.contiguous(), ids, dw.size(1), /*padding_idx=*/-1, false).t());
    return;
  }
#endif
  Workspace workspace;
  cpu::scatter_columns({dtype_of(d), ids.size(0), dw.size(1), dw.size(0), ids.const_data_ptr<int64_t>(), d.const_data_ptr(),
                        d.stride(0), dw.data_ptr()},
                       [&](int64_t bytes) { return workspace.take(bytes); });
}

void gather_input_product(const Call& call, ForwardCall& made) {
  ForwardParams& p = made.params;
  const int64_t columns = gate_count(p.cell) * p.H, I = call.params[0].size(1);
  const Tensor ids = ids_of_rows(call, p.seq, I);
  // What forward saves has room for the product until the step that overwrites it.
  const bool in_gates = made.gates.defined();
  made.columns = in_gates ? made.gates.view({p.D, p.seq.N, slot_count(p.cell) * p.H})
                          : empty_inside(call.like(), {p.D, p.seq.N, columns});
  for (int d = 0; d < p.D; ++d) {
    gather_columns_into(made.columns.select(0, d), call.params_of_direction(d)[0], ids);
  }
  p.columns = made.columns.const_data_ptr();
  p.columns_stride = made.columns.size(2);
}

}  // namespace fused_rnn
