// Kernels<kMath> for one kind of arithmetic: which kernel serves a role, cell and tile. Included by kernels_*.cu only.
#pragma once
#include <stdexcept>

#include "cuda/device/kernel_cell.h"
#include "cuda/step/backward.cuh"
#include "cuda/step/forward.cuh"

namespace fused_rnn::cuda {

// Calls f with the tile size as a compile-time constant.
template <MathKind kMath, class F>
auto dispatch_tile(TileSize size, F&& f) {
  if constexpr (has_tile(kMath, TileSize::kLarge)) {
    if (size == TileSize::kLarge) return f(std::integral_constant<TileSize, TileSize::kLarge>{});
  }
  if (size == TileSize::kLarge) throw std::invalid_argument("no kernel of this arithmetic has the large tile");
  if (size == TileSize::kMedium) return f(std::integral_constant<TileSize, TileSize::kMedium>{});
  return f(std::integral_constant<TileSize, TileSize::kSmall>{});
}

template <MathKind kMath>
ForwardKernel Kernels<kMath>::forward(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> ForwardKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    if (role == KernelRole::kProject) {
      return &project_kernel<Geometry<KernelRole::kProject, CellKind::kLstm, kMath, kSize>>;
    }
    return dispatch_kernel_cell(cell, [&](auto kind) -> ForwardKernel {
      constexpr CellKind kCell = decltype(kind)::value;
      if (role == KernelRole::kForwardInput) {
        return &forward_kernel<Geometry<KernelRole::kForwardInput, kCell, kMath, kSize>>;
      }
      return &forward_kernel<Geometry<KernelRole::kForward, kCell, kMath, kSize>>;
    });
  });
}

template <MathKind kMath>
BackwardKernel Kernels<kMath>::backward(KernelRole role, CellKind cell, TileSize size) {
  return dispatch_tile<kMath>(size, [&](auto tile) -> BackwardKernel {
    constexpr TileSize kSize = decltype(tile)::value;
    if (role == KernelRole::kStateGrad) {
      return &state_grad_kernel<Geometry<KernelRole::kStateGrad, CellKind::kLstm, kMath, kSize>>;
    }
    return dispatch_kernel_cell(cell, [&](auto kind) -> BackwardKernel {
      return &backward_kernel<Geometry<KernelRole::kBackward, decltype(kind)::value, kMath, kSize>>;
    });
  });
}

}  // namespace fused_rnn::cuda
