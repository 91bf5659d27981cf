#include "cpu/scan/layer_weights.h"

#include "core/cells.h"
#include "core/dispatch.h"

namespace fused_rnn::cpu {
namespace {

int recurrent_slot_of(CellKind cell, int gate) {
  return dispatch_cell(cell, [&](auto tag) { return Cell<decltype(tag)::value>::recurrent_slot(gate); });
}

}  // namespace

template <class A>
void LayerWeights<A>::pack_share(const Kernels<A>& kernels, const LayerSource& source, int share, int shares) const {
  const Range panels = share_of(h.shape.panels, shares, share), r_panels = share_of(r.shape.panels, shares, share);
  if (x.packing == Packing::kBefore) pack(kernels, x, panels.first, panels.last);
  if (h.packing == Packing::kBefore) pack(kernels, h, panels.first, panels.last);
  if (r.packing == Packing::kBefore) pack(kernels, r, r_panels.first, r_panels.last);
  const int width = h.shape.width;
  pack_biases(kernels, source, {h.shape.columns_before(panels.first) / width, h.shape.columns_before(panels.last) / width});
}

template <class A>
void LayerWeights<A>::pack_biases(const Kernels<A>& kernels, const LayerSource& source, const Range& vectors) const {
  const Shape& shape = h.shape;
  const auto load = kernels.load[storage_index(source.dtype)];
  const int64_t size = dtype_size(source.dtype);
  const int width = shape.width;
  const void *const b_ih = source.weights.b_ih, *const b_hh = source.weights.b_hh;
  bool one_slot[kMaxTileVectors];  // of each gate: both its biases are added to the same slot
  for (int gate = 0; gate < shape.gates; ++gate) one_slot[gate] = recurrent_slot_of(source.cell, gate) == gate;
  for (int64_t v = vectors.first; v < vectors.last; ++v) {
    const auto [gate, unit, lanes] = vector_of(shape, v);
    const int64_t from = gate * shape.units + unit;
    A *to_x = bias_x + v * width, *to_h = bias_h + v * width;
    if (!b_ih || lanes < width) std::fill_n(to_x, width, A(0));
    if (!b_hh || lanes < width) std::fill_n(to_h, width, A(0));
    if (b_ih) load(stored_at(b_ih, from, size), to_x, lanes);
    if (b_hh) load(stored_at(b_hh, from, size), to_h, lanes);
    if (!one_slot[gate]) continue;
    for (int i = 0; i < lanes; ++i) {
      to_x[i] += to_h[i];
      to_h[i] = 0;
    }
  }
}

template <class A>
void CachedLayerWeights<A>::lease(const ScanPlan<A>& plan, const Weights* weights, int directions, bool one_step) {
  // Then one thread alone reads a panel, once, and its hash can wait until what it reads has come into L2.
  packs_late_ = one_step && plan.threads.batch_teams == 1;
  const Matrix<A>* const matrices[] = {&plan.x, &plan.h, &plan.r};
  for (int d = 0; d < directions; ++d) {
    const WeightMatrix sources[] = {weights[d].w_ih, weights[d].w_hh, weights[d].w_hr};
    for (int i = 0; i < kMatrices; ++i) {
      const Matrix<A>& m = *matrices[i];
      const Shape& s = m.shape;
      leases_[d][i].take({sources[i].data, s.depth, s.units, s.gates, s.width, sources[i].storage, m.form, m.parts},
                         m.bytes(), s.panels);
    }
  }
}

template <class A>
LayerWeights<A> CachedLayerWeights<A>::layout(Arena& arena, const ScanPlan<A>& plan, const Weights& weights, int d) {
  LayerWeights<A> result{plan.x, plan.h, plan.r, nullptr, nullptr};
  const WeightMatrix sources[] = {weights.w_ih, weights.w_hh, weights.w_hr};
  int i = 0;
  for (Matrix<A>* m : {&result.x, &result.h, &result.r}) {
    m->source = sources[i];
    m->infinite = &infinite_[d][i];
    m->cached = leases_[d][i].matrix();
    if (packs_late_ && m->cached && m->form == Form::kPacked) m->packing = Packing::kLate;
    if (m->cached) {
      m->packed = static_cast<A*>(m->cached->aligned);
      m->tiles = static_cast<uint16_t*>(m->cached->aligned);
    } else {
      m->packed = arena.take<A>(m->packed_elements());
      m->tiles = arena.take<uint16_t>(m->tile_elements());
    }
    ++i;
  }
  result.bias_x = arena.take<A>(plan.h.shape.columns());
  result.bias_h = arena.take<A>(plan.h.shape.columns());
  return result;
}

template struct LayerWeights<float>;
template struct LayerWeights<double>;
template class CachedLayerWeights<float>;
template class CachedLayerWeights<double>;

}  // namespace fused_rnn::cpu
