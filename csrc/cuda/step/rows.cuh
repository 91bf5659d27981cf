// What a block of a step kernel notes of its batch rows at one step.
#pragma once
#include <simt.cuh>

#include "core/active.h"
#include "core/modifier.h"
#include "plan/step_geometry.h"

namespace fused_rnn::cuda {

enum RowFlags : int {
  kExists = 1,       // b < B
  kActive = 2,       // takes part in this step
  kHasPrevious = 4,  // was active at the previous step in scan order
  kHasNext = 8,      // will be active at the next
  kReset = 16,       // its state is replaced before this step
  kNever = 32,       // takes part in no step
};

// The time of a step in the order of a direction's scan.
__device__ __forceinline__ int64_t time_of_step(const Sequence& seq, int64_t step, int dir) {
  return dir ? seq.T - 1 - step : step;
}

// Of row b at a step of forward, but for source[], which is the caller's. other: row of the previous step.
__device__ __forceinline__ RowInfo forward_row(const Sequence& seq, const Modifier& modifier, int64_t step, int dir,
                                               int64_t b) {
  RowInfo info{};
  if (b >= seq.B) return info;
  const int64_t t = time_of_step(seq, step, dir), previous = dir ? t + 1 : t - 1, next = dir ? t - 1 : t + 1;
  info.flags = kExists;
  if (!is_active(seq, 0, b)) info.flags |= kNever;
  info.row = row_of(seq, t, b);
  if (!is_active(seq, t, b)) return info;
  info.flags |= kActive;
  if (is_reset(modifier, info.row)) info.flags |= kReset;
  if (is_active(seq, next, b)) info.flags |= kHasNext;
  if (is_active(seq, previous, b)) {
    info.flags |= kHasPrevious;
    info.other = row_of(seq, previous, b);
  }
  return info;
}

// Of backward: kActive, kReset and row describe this step; kHasPrevious the previous one, whose row is `other`; kHasNext the
// next. next_row is its row, next_reset whether the state was replaced before it. At step -1 `next` is the row's first
// active step.
__device__ __forceinline__ RowInfo backward_row(const Sequence& seq, const Modifier& modifier, int64_t step, int dir,
                                                int64_t b, int64_t& next_row, bool& next_reset) {
  RowInfo info{};
  next_row = 0;
  next_reset = false;
  if (b >= seq.B) return info;
  info.flags = kExists;
  int64_t t = time_of_step(seq, step, dir), next = dir ? t - 1 : t + 1;
  if (step < 0) {
    t = -1;
    next = dir ? active_steps(seq, b) - 1 : 0;
  }
  if (!is_active(seq, 0, b)) info.flags |= kNever;
  if (is_active(seq, next, b)) {
    info.flags |= kHasNext;
    next_row = row_of(seq, next, b);
    next_reset = is_reset(modifier, next_row);
  }
  if (step < 0) return info;
  const int64_t previous = dir ? t + 1 : t - 1;
  info.row = row_of(seq, t, b);
  if (!is_active(seq, t, b)) return info;
  info.flags |= kActive;
  if (is_reset(modifier, info.row)) info.flags |= kReset;
  if (is_active(seq, previous, b)) {
    info.flags |= kHasPrevious;
    info.other = row_of(seq, previous, b);
  }
  return info;
}

}  // namespace fused_rnn::cuda
