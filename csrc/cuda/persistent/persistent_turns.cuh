// The loop that forward and backward share. A turn is one row tile at one step; all row tiles of a step precede the next
// step.
#pragma once
#include "cuda/persistent/persistent_elements.cuh"

namespace fused_rnn::cuda {

struct Turn {
  int step, row_tile;
};

// Where a block is in the loop, and what has been requested for its next elements.
// Elements: PersistentForward<G> or PersistentBackward<G>.
template <class G, class Elements>
struct Turns {
  using Place = ElementPlace<G>;
  static constexpr Schedule kSchedule = Place::kSchedule;

  Elements& elements;
  int row_tiles;
  StepRows rows;                                    // of the turn's step
  typename Elements::Element x[Place::kPerThread];  // of the elements that are finished next
  int buffer = 0;  // parity of the turns made: the buffer of sums in use and, with kAlternate, the half whose turn it is

  __device__ __forceinline__ Turns(Elements& all, const BlockPlace& block)
      : elements(all), row_tiles(block.row_tiles), rows(all.seq, [&](int step) { return all.time(step); }) {}

  // Requests what the elements need in a turn; its_rows: of its step.
  __device__ __forceinline__ void load(int half, const Turn& turn, const StepRows& its_rows) {
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) {
      elements.load(Place(half, i), turn.row_tile, turn.step, its_rows, x[i]);
    }
  }

  // The turn after this one, if there is one.
  struct Next {
    bool exists, same_step;
    Turn turn;
  };
  __device__ __forceinline__ Next next_of(const Turn& turn) const {
    const bool same_step = turn.row_tile + 1 < row_tiles;
    return {same_step || turn.step + 1 < elements.steps,
            same_step,
            {same_step ? turn.step : turn.step + 1, same_step ? turn.row_tile + 1 : 0}};
  }
  __device__ __forceinline__ StepRows rows_of(const Next& next) const { return next.same_step ? rows : rows.following(); }
  // Goes on to the rows of the next turn.
  __device__ __forceinline__ void advance(const Turn& turn, const Next& next) {
    if (!next.same_step) rows.advance(elements.seq, elements.time(turn.step + 3));
  }
};

}  // namespace fused_rnn::cuda
