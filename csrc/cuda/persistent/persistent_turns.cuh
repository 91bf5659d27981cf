// What the loops of forward and backward share. A turn is one row tile at one step; all row tiles of a step precede the next
// step.
#pragma once
#include "cuda/persistent/persistent_elements.cuh"

namespace fused_rnn::cuda {

// The turn after that of `row_tile` at `step`, if there is one.
struct NextTurn {
  bool same_step, exists;
  int row_tile;

  __device__ __forceinline__ NextTurn(const BlockPlace& block, int row_tile_now, int step, int steps)
      : same_step(row_tile_now + 1 < block.row_tiles),
        exists(same_step || step + 1 < steps),
        row_tile(same_step ? row_tile_now + 1 : 0) {}
};

// Requests what the elements of a thread need in a turn. half: as in ElementPlace; rows: of the turn's step.
template <class Elements, int kCount>
__device__ __forceinline__ void load_elements(const Elements& elements, typename Elements::Element (&x)[kCount], int half,
                                              int row_tile, int step, const StepRows& rows) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    elements.load(typename Elements::Place(half, i), row_tile, step, rows, x[i]);
  }
}

}  // namespace fused_rnn::cuda
