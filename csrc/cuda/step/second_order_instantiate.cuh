// SecondOrderKernels<kMath> for one kind of arithmetic: which kernel serves a role, cell and tile. Included by
// second_order_*.cu only.
#pragma once
#include "cuda/step/dispatch_tile.cuh"
#include "cuda/step/dual_backward.cuh"
#include "cuda/step/tangents.cuh"

namespace fused_rnn::cuda {

template <MathKind kMath>
TangentKernel SecondOrderKernels<kMath>::tangents(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> TangentKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    if (role == KernelRole::kProjectTangents) {
      return &project_tangent_kernel<Geometry<KernelRole::kProjectTangents, kAnyCell, kMath, kSize>>;
    }
    if (role != KernelRole::kTangents) throw std::invalid_argument("not a kernel of tangents");
    return dispatch_kernel_cell(cell, [](auto kind) -> TangentKernel {
      return &tangent_kernel<Geometry<KernelRole::kTangents, decltype(kind)::value, kMath, kSize>>;
    });
  });
}

template <MathKind kMath>
DualKernel SecondOrderKernels<kMath>::dual_backward(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> DualKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    if (role == KernelRole::kDualStateGrad) {
      return &dual_state_grad_kernel<Geometry<KernelRole::kDualStateGrad, kAnyCell, kMath, kSize>>;
    }
    if (role != KernelRole::kDualBackward) throw std::invalid_argument("not a kernel of dual numbers");
    return dispatch_kernel_cell(cell, [](auto kind) -> DualKernel {
      return &dual_backward_kernel<Geometry<KernelRole::kDualBackward, decltype(kind)::value, kMath, kSize>>;
    });
  });
}

}  // namespace fused_rnn::cuda
