// The weights of a forward scan in the form of its products, and the biases in the order of the gate matrix.
#pragma once
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {

// One direction of a layer as torch stores it.
struct LayerSource {
  CellKind cell;
  const Weights& weights;
  DType dtype;  // of the biases
};

// One direction's weights.
template <class A>
struct LayerWeights {
  Matrix<A> x;  // W_ih
  Matrix<A> h;  // W_hh
  Matrix<A> r;  // W_hr
  // Each bias of b_ih and b_hh is added to the slot that its gate's product is added to. bias_x has b_ih, and b_hh where the
  // slot is the same (all but GRU's n); bias_h has the rest of b_hh. [columns of the gate matrix]
  A *bias_x, *bias_h;

  // Packs share `share` of `shares`.
  void pack_share(const Kernels<A>& kernels, const LayerSource& source, int share, int shares) const;
  // Vectors of both biases.
  void pack_biases(const Kernels<A>& kernels, const LayerSource& source, const Range& vectors) const;
};

// The weights that a call finds in the cache (weight_cache.h), or leaves there: an inference, and in training a single step,
// which most often is one of a loop's with the same weights. Training of sequences has none.
template <class A>
class CachedLayerWeights {
 public:
  // Before the workspace is laid out, which has room for what is not cached. one_step: each product is made once.
  void lease(const ScanPlan<A>& plan, const Weights* weights, int directions, bool one_step);
  LayerWeights<A> layout(Arena& arena, const ScanPlan<A>& plan, const Weights& weights, int d);

 private:
  static constexpr int kMatrices = 3;  // x, h, r
  CacheLease leases_[2][kMatrices];
  bool packs_late_ = false;
  std::atomic<bool> infinite_[2][kMatrices] = {};  // Matrix::infinite
};

}  // namespace fused_rnn::cpu
