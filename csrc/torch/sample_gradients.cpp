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

// rows [N, C] as [V, N / V, C], a view.
Tensor by_sample(const Tensor& rows, int64_t samples) {
  return rows.unflatten(0, {rows.size(0) / samples, samples}).transpose(0, 1);
}

// a^T b for each sample: a [N, M], b [N, K], into out [V, M, K] of memory that calls in turn share: to map and clear new
// memory for it would take as long as half of the product.
Tensor products(const Tensor& a, const Tensor& b, int64_t samples) {
  Tensor out = empty_inside(a, {samples, a.size(1), b.size(1)});
  at::bmm_out(out, by_sample(a, samples).transpose(1, 2), by_sample(b, samples));
  return out;
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
  const Tensor y = given.saved.y ? output_of_direction(*given.saved.y, s, d) : empty_like(call.like(), {s.N, s.P});
  gradients.push_back(products(d_rg, previous_states(call, s, y, d), samples));
  if (call.recipe.has_biases) {
    gradients.push_back(sums(d_ig, samples));
    gradients.push_back(S > G ? sums(d_rg, samples) : gradients.back().clone());
  }
  if (s.projection) {
    gradients.push_back(products(made.d_h.select(0, d), unprojected(given.saved, d), samples));
  }
}

}  // namespace fused_rnn
