#pragma once
#include "cuda/formula/formula_cluster.cuh"

namespace fused_rnn::cuda {
template <class C, MathKind kMath>
__device__ __forceinline__ void formula_cluster_backward(const FormulaClusterBackward& arguments) {}
}  // namespace fused_rnn::cuda
