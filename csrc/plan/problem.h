// What the planners, the CPU's and the GPU's, need to know of a call of one layer.
#pragma once
#include "core/params.h"

namespace fused_rnn {

// One layer, forward or backward.
struct Problem {
  CellKind cell;
  DType dtype;
  bool allow_tf32;  // fp32 only
  int64_t T, B, I, H, P;
  int D;
  bool ragged;    // lengths or offsets are given
  bool training;  // forward keeps what backward needs
  bool backward;
  bool modified;      // by what kernels of single steps alone have: options of steps, reset states, gradients of every c
  bool dual = false;  // forward of tangents, backward of dual numbers; then `modified` says nothing
};

inline bool operator==(const Problem& a, const Problem& b) {
  return a.cell == b.cell && a.dtype == b.dtype && a.allow_tf32 == b.allow_tf32 && a.T == b.T && a.B == b.B && a.I == b.I &&
         a.H == b.H && a.P == b.P && a.D == b.D && a.ragged == b.ragged && a.training == b.training &&
         a.backward == b.backward && a.modified == b.modified && a.dual == b.dual;
}

}  // namespace fused_rnn
