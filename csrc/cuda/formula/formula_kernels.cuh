// The kernels of a formula, by name. What is compiled (fused_rnn/formula/cuda.py) is the cell's struct and a line
//   FUSED_RNN_FORMULA_FORWARD(cell, math, segment, tile) or FUSED_RNN_FORMULA_BACKWARD(cell, math, segment, tile)
// of every segment with the small tile and, where it makes a product, with the medium one, and
// FUSED_RNN_FORMULA_INITIAL(cell, math, tile), of family `single` FUSED_RNN_FORMULA_SINGLE_FORWARD(cell, math, tile), and
// the two of each persistent family, FUSED_RNN_FORMULA_CLUSTER_FORWARD(cell, math), FUSED_RNN_FORMULA_CLUSTER_BACKWARD(cell,
// math) and the same with GRID.
#pragma once
#include "cuda/formula/formula_backward.cuh"
#include "cuda/formula/formula_forward.cuh"
#include "cuda/formula/formula_persistent_backward.cuh"
#include "cuda/formula/formula_persistent_forward.cuh"

namespace fused_rnn::cuda {

// Of both tiles the number of threads depends on the direction alone.
constexpr int formula_threads(bool backward, TileSize size) {
  return tile_threads(tile_shape(backward ? KernelRole::kBackward : KernelRole::kForward, MathKind::kFp32, size));
}

}  // namespace fused_rnn::cuda

#define FUSED_RNN_FORMULA_KERNEL(name, tile, backward, Step, ...)                                                           \
  extern "C" __global__ void __launch_bounds__(fused_rnn::cuda::formula_threads(backward, fused_rnn::cuda::TileSize::tile), \
                                               1) name(const __grid_constant__ fused_rnn::cuda::Step s) {                   \
    using namespace fused_rnn::cuda;                                                                                        \
    __VA_ARGS__(s);                                                                                                         \
  }
#define FUSED_RNN_FORMULA_FORWARD(cell, math, segment, tile)                            \
  FUSED_RNN_FORMULA_KERNEL(forward_##segment##_##tile, tile, false, FormulaForwardStep, \
                           formula_forward<cell, MathKind::math, TileSize::tile, segment>)
#define FUSED_RNN_FORMULA_SINGLE_FORWARD(cell, math, tile)                           \
  FUSED_RNN_FORMULA_KERNEL(single_forward_0_##tile, tile, false, FormulaForwardStep, \
                           formula_single_forward<cell, MathKind::math, TileSize::tile>)
#define FUSED_RNN_FORMULA_BACKWARD(cell, math, segment, tile)                            \
  FUSED_RNN_FORMULA_KERNEL(backward_##segment##_##tile, tile, true, FormulaBackwardStep, \
                           formula_backward<cell, MathKind::math, TileSize::tile, segment>)
#define FUSED_RNN_FORMULA_INITIAL(cell, math, tile)                           \
  FUSED_RNN_FORMULA_KERNEL(initial_0_##tile, tile, true, FormulaBackwardStep, \
                           formula_initial_gradients<cell, MathKind::math, TileSize::tile>)
#define FUSED_RNN_FORMULA_PERSISTENT_KERNEL(name, Arguments, ...)                             \
  extern "C" __global__ void __launch_bounds__(fused_rnn::cuda::kFormulaPersistentThreads, 1) \
      name(const __grid_constant__ fused_rnn::cuda::Arguments arguments) {                    \
    using namespace fused_rnn::cuda;                                                          \
    __VA_ARGS__(arguments);                                                                   \
  }
#define FUSED_RNN_FORMULA_CLUSTER_FORWARD(cell, math)                                     \
  FUSED_RNN_FORMULA_PERSISTENT_KERNEL(cluster_forward_0_kSmall, FormulaPersistentForward, \
                                      formula_persistent_forward<cell, MathKind::math, false>)
#define FUSED_RNN_FORMULA_CLUSTER_BACKWARD(cell, math)                                      \
  FUSED_RNN_FORMULA_PERSISTENT_KERNEL(cluster_backward_0_kSmall, FormulaPersistentBackward, \
                                      formula_persistent_backward<cell, MathKind::math, false>)
#define FUSED_RNN_FORMULA_GRID_FORWARD(cell, math)                                     \
  FUSED_RNN_FORMULA_PERSISTENT_KERNEL(grid_forward_0_kSmall, FormulaPersistentForward, \
                                      formula_persistent_forward<cell, MathKind::math, true>)
#define FUSED_RNN_FORMULA_GRID_BACKWARD(cell, math)                                      \
  FUSED_RNN_FORMULA_PERSISTENT_KERNEL(grid_backward_0_kSmall, FormulaPersistentBackward, \
                                      formula_persistent_backward<cell, MathKind::math, true>)
