// PointwiseKernels<kMath> for one kind of arithmetic. Included by gemm_*.cu only.
#pragma once
#include <stdexcept>

#include "cuda/device/kernel_cell.h"
#include "cuda/gemm/pointwise_backward.cuh"
#include "cuda/gemm/pointwise_forward.cuh"
#include "cuda/step/dispatch_tile.cuh"

namespace fused_rnn::cuda {

template <KernelRole kRole, CellKind kCell, MathKind kMath>
using PointwiseGeometry = Geometry<kRole, kCell, kMath, TileSize::kPointwise>;

template <MathKind kMath>
PointwiseForwardKernel PointwiseKernels<kMath>::forward(KernelRole role, CellKind cell) {
  return dispatch_kernel_cell(cell, [&](auto kind) -> PointwiseForwardKernel {
    constexpr CellKind kCell = decltype(kind)::value;
    if (role == KernelRole::kForward)
      return &pointwise_forward_kernel<PointwiseGeometry<KernelRole::kForward, kCell, kMath>>;
    if (role == KernelRole::kForwardModified)
      return &pointwise_forward_kernel<PointwiseGeometry<KernelRole::kForwardModified, kCell, kMath>>;
    if (role == KernelRole::kProject)
      return &pointwise_project_kernel<PointwiseGeometry<KernelRole::kProject, kAnyCell, kMath>>;
    throw std::invalid_argument("not a kernel of forward");
  });
}

template <MathKind kMath>
PointwiseForwardKernel PointwiseKernels<kMath>::first_states() {
  return &first_states_kernel<PointwiseGeometry<KernelRole::kProject, kAnyCell, kMath>>;
}

template <MathKind kMath>
PointwiseBackwardKernel PointwiseKernels<kMath>::backward(KernelRole role, CellKind cell) {
  return dispatch_kernel_cell(cell, [&](auto kind) -> PointwiseBackwardKernel {
    constexpr CellKind kCell = decltype(kind)::value;
    if (role == KernelRole::kBackward)
      return &pointwise_backward_kernel<PointwiseGeometry<KernelRole::kBackward, kCell, kMath>>;
    if (role == KernelRole::kBackwardModified)
      return &pointwise_backward_kernel<PointwiseGeometry<KernelRole::kBackwardModified, kCell, kMath>>;
    if (role == KernelRole::kStateGrad)
      return &pointwise_state_grad_kernel<PointwiseGeometry<KernelRole::kStateGrad, kAnyCell, kMath>>;
    throw std::invalid_argument("not a kernel of backward");
  });
}

}  // namespace fused_rnn::cuda
