// Kernels<kMath> for one kind of arithmetic: which kernel serves a role, cell and tile. Included by kernels_*.cu only.
#pragma once
#include "cuda/step/backward.cuh"
#include "cuda/step/dispatch_tile.cuh"
#include "cuda/step/forward.cuh"

namespace fused_rnn::cuda {

template <MathKind kMath>
ForwardKernel Kernels<kMath>::forward(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> ForwardKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    return dispatch_kernel_cell(cell, [&](auto kind) -> ForwardKernel {
      constexpr CellKind kCell = decltype(kind)::value;
      switch (role) {
        case KernelRole::kForward: return &forward_kernel<Geometry<KernelRole::kForward, kCell, kMath, kSize>>;
        case KernelRole::kForwardInput: return &forward_kernel<Geometry<KernelRole::kForwardInput, kCell, kMath, kSize>>;
        case KernelRole::kForwardModified:
          return &forward_kernel<Geometry<KernelRole::kForwardModified, kCell, kMath, kSize>>;
        case KernelRole::kProject: return &project_kernel<Geometry<KernelRole::kProject, kAnyCell, kMath, kSize>>;
        case KernelRole::kBackward:
        case KernelRole::kBackwardModified:
        case KernelRole::kStateGrad:
        case KernelRole::kTangents:
        case KernelRole::kProjectTangents:
        case KernelRole::kDualBackward:
        case KernelRole::kDualStateGrad: break;
      }
      throw std::invalid_argument("not a kernel of forward");
    });
  });
}

template <MathKind kMath>
BackwardKernel Kernels<kMath>::backward(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> BackwardKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    return dispatch_kernel_cell(cell, [&](auto kind) -> BackwardKernel {
      switch (role) {
        case KernelRole::kBackward:
          return &backward_kernel<Geometry<KernelRole::kBackward, decltype(kind)::value, kMath, kSize>>;
        case KernelRole::kBackwardModified:
          return &backward_kernel<Geometry<KernelRole::kBackwardModified, decltype(kind)::value, kMath, kSize>>;
        case KernelRole::kStateGrad: return &state_grad_kernel<Geometry<KernelRole::kStateGrad, kAnyCell, kMath, kSize>>;
        case KernelRole::kForward:
        case KernelRole::kForwardInput:
        case KernelRole::kForwardModified:
        case KernelRole::kProject:
        case KernelRole::kTangents:
        case KernelRole::kProjectTangents:
        case KernelRole::kDualBackward:
        case KernelRole::kDualStateGrad: break;
      }
      throw std::invalid_argument("not a kernel of backward");
    });
  });
}

}  // namespace fused_rnn::cuda
