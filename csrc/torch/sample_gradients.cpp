// The gradients of a layer's weights for each sample of a batch: dW_v = sum over the rows of sample v of d_gates^T x, as a
// batch of products. Row b of a step belongs to sample b % V, so that rows [N, C] of all samples are [N / V, V, C], and the
// rows of one sample a strided view.
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>

#include "core/cells.h"
#include "torch/layer.h"

namespace fused_rnn {
namespace {

// rows [N, C] as [V, N / V, C], or transposed as [V, C, N / V], by one view: chains of torch's take microseconds each.
Tensor by_sample(const Tensor& rows, int64_t samples, bool transposed = false) {
  const int64_t steps = rows.size(0) / samples, row = rows.stride(0), column = rows.stride(1);
  return transposed ? rows.as_strided({samples, rows.size(1), steps}, {row, column, samples * row})
                    : rows.as_strided({samples, steps, rows.size(1)}, {row, samples * row, column});
}

// a^T b for each sample: a [N, M], b [N, K], into out [V, M, K] of memory that calls in turn share: to map and clear new
// memory for it would take as long as half of the product.
Tensor products(const Tensor& a, const Tensor& b, int64_t samples) {
  Tensor out = empty_inside(a, {samples, a.size(1), b.size(1)});
  at::bmm_out(out, by_sample(a, samples, /*transposed=*/true), by_sample(b, samples));
  return out;
}

// d_rg^T h_prev for each sample. Where every row takes part in every step from zeros on, h_prev is y moved by one step.
Tensor recurrent_products(const Call& call, const LayerShapes& s, const Tensor& d_rg, const OptionalTensor& y, int d,
                          int64_t samples) {
  const Tensor of_direction = y ? output_of_direction(*y, s, d) : empty_like(call.like(), {s.N, s.P});
  if (s.T < 2 || !call.rows.plain() || call.h0()) {
    return products(d_rg, previous_states(call, s, of_direction, d), samples);
  }
  const int64_t later = d == 0 ? s.B : 0, earlier = d == 0 ? 0 : s.B, count = s.N - s.B;
  return products(part(d_rg, 0, later, later + count), part(of_direction, 0, earlier, earlier + count), samples);
}

Tensor sums(const Tensor& rows, int64_t samples) { return at::sum(by_sample(rows, samples), {1}); }

}  // namespace

void sample_weight_gradients(const Call& call, const ResultGradients& given, const BackwardCall& made, const Tensor& x,
                             const Tensor& dg, int d, int64_t samples, std::vector<Tensor>& gradients) {
  const LayerShapes& s = made.shapes;
  const CellKind cell = call.recipe.cell;
  const int64_t G = gate_count(cell), S = slot_count(cell), H = s.H;
  TORCH_CHECK_VALUE(!call.has_ids(), "input: expected no ids with gradients of weights by sample");
  TORCH_CHECK_VALUE(samples > 0 && s.B % samples == 0 && s.N % samples == 0, "samples: expected a divisor of the batch ",
                    s.B, ", got ", samples);
  const Tensor d_rg = part(dg, 1, (S - G) * H, S * H);
  std::vector<Tensor> columns;
  for (const auto& [some, first] : input_columns(cell, H, dg)) columns.push_back(some);
  const Tensor d_ig = columns.size() == 1 ? columns[0] : at::cat(columns, 1);  // fewer elements than the gradients
  gradients.push_back(products(d_ig, x, samples));
  gradients.push_back(recurrent_products(call, s, d_rg, given.saved.y, d, samples));
  if (call.recipe.has_biases) {
    gradients.push_back(sums(d_ig, samples));
    gradients.push_back(S > G ? sums(d_rg, samples) : gradients.back().clone());
  }
  if (s.projection) {
    gradients.push_back(products(made.d_h.select(0, d), unprojected(given.saved, d), samples));
  }
}

}  // namespace fused_rnn
