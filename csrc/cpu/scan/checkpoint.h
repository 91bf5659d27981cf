// Keeps the states before every k-th step only. Backward recomputes each range of k steps, the last range first, bit for bit
// as in a layer that keeps the states of all steps.
//
// Steps are counted in the order of a direction's scan: step s is t = s of direction 0, t = T - 1 - s of direction 1. Range
// j is steps [j * k, (j + 1) * k). There are K = (T - 1) / k kept states, before step (j + 1) * k for j = 0 .. K - 1.
#pragma once
#include <functional>

#include "core/params.h"
#include "cpu/cpu.h"

namespace fused_rnn::cpu {

// Where gates and cs of some rows lie: [D, count, .], from row first[d] of direction d on.
struct SavedRows {
  int64_t count, first[2];

  int64_t at(int d, int64_t row) const { return d * count + row - first[d]; }
};

// Which steps forward runs, and where it keeps states for checkpointing.
struct ForwardPart {
  int64_t every = 0;  // k
  // [D, K, B, H] of the arithmetic type, of cells that have c: the first run writes it, a later one reads it.
  void* c = nullptr;
  // A later run: steps [first, end) only. The h before them is in y (put_outputs).
  bool again = false;
  int64_t first = 0, end = 0;
  SavedRows saved{};         // of params.gates and cs
  void* c_before = nullptr;  // [D, B, H], in dtype: c before step `first`, of rows that have done a step by then
};
void forward_part(ForwardParams& p, const ForwardPart& part, const Allocate& allocate);

// Backward, with p.gates and p.cs as `again` leaves them for a range of steps, the last range first.
struct BackwardPart {
  int64_t every = 0;
  const void* c_before = nullptr;
  std::function<SavedRows(int64_t first, int64_t end)> again;
};
void backward_in_parts(BackwardParams& p, const BackwardPart& part, const Allocate& allocate);

// The outputs before step (j + 1) * k of every row that has done a step by then: from y [N, D * P] to kept [D, K, B, P],
// zeros for the other rows; and back to their places in y.
void take_outputs(const ForwardParams& p, int64_t every, void* checkpoints);
void put_outputs(const ForwardParams& p, int64_t every, const void* checkpoints);

// The rows in memory of steps [first, end) of all directions, as many as the direction with the most has.
SavedRows rows_of_steps(const Sequence& seq, int D, int64_t first, int64_t end);

// Of a row of `length` steps, those done before step s of a direction's scan; and the time of the last of these.
inline int64_t steps_done(int64_t T, int64_t length, int d, int64_t s) {
  const int64_t done = d == 0 ? s : s - (T - length);
  return done < 0 ? 0 : done > length ? length : done;
}
inline int64_t time_of_last(int64_t length, int d, int64_t done) { return d == 0 ? done - 1 : length - done; }

}  // namespace fused_rnn::cpu
