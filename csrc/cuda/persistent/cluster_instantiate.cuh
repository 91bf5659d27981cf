// ClusterKernels<kMath> for one kind of arithmetic: family `cluster`, 16, 32 or 48 units a block. Included by cluster_*.cu
// only.
#pragma once
#include <stdexcept>

#include "cuda/persistent/exchange_cluster.cuh"
#include "cuda/persistent/persistent_backward.cuh"

namespace fused_rnn::cuda {

template <MathKind kMath, CellKind kCell, int kUnitTiles, bool kBackward>
using ClusterGeometry = PersistentGeometry<kCell, kMath, kUnitTiles, kBackward, ClusterExchange>;

// Calls f with two compile-time constants: the cell under whose name the kernels are compiled, and the unit tiles of a
// block.
template <class F>
auto dispatch_cluster(CellKind cell, int unit_tiles, F&& f) {
  const auto with_cell = [&](auto tiles) { return dispatch_kernel_cell(cell, [&](auto kind) { return f(kind, tiles); }); };
  switch (unit_tiles) {
    case 1: return with_cell(std::integral_constant<int, 1>{});
    case 2: return with_cell(std::integral_constant<int, 2>{});
    case 3: return with_cell(std::integral_constant<int, 3>{});
    default: throw std::invalid_argument("no cluster kernel has so many units a block");
  }
}

template <MathKind kMath>
ForwardSequenceKernel ClusterKernels<kMath>::forward(CellKind cell, int unit_tiles) {
  return dispatch_cluster(cell, unit_tiles, [](auto kind, auto tiles) -> ForwardSequenceKernel {
    return &persistent_forward_kernel<ClusterGeometry<kMath, decltype(kind)::value, decltype(tiles)::value, false>>;
  });
}
template <MathKind kMath>
BackwardSequenceKernel ClusterKernels<kMath>::backward(CellKind cell, int unit_tiles) {
  return dispatch_cluster(cell, unit_tiles, [](auto kind, auto tiles) -> BackwardSequenceKernel {
    return &persistent_backward_kernel<ClusterGeometry<kMath, decltype(kind)::value, decltype(tiles)::value, true>>;
  });
}

}  // namespace fused_rnn::cuda
