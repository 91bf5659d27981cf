// What family `cudnn` has of our cells, and what calls it can serve: the one place that knows. The planner asks about a
// problem, csrc/torch/cudnn_cuda.cpp about a call, fused_rnn.explain (cudnn_lacks of the extension) about a module's.
#pragma once
#include <string>

#include "core/params.h"

namespace fused_rnn {

// cudnnRNNMode_t of the cells that cuDNN has; -1 for every other cell.
constexpr int64_t cudnn_mode(CellKind cell) {
  constexpr CellKind kModes[] = {CellKind::kRnnRelu, CellKind::kRnnTanh, CellKind::kLstm, CellKind::kGru};
  for (int64_t mode = 0; mode < 4; ++mode) {
    if (kModes[mode] == cell) return mode;
  }
  return -1;
}

// What decides whether cuDNN can serve the call of a stack, beside the shapes of its tensors. The defaults lack nothing.
struct CudnnCall {
  CellKind cell{};
  int64_t T = 1;
  bool enabled = true;         // torch has cuDNN and may use it
  bool plain = true;           // plain tensors of the device, outside of torch's transforms and modes
  bool deterministic = false;  // torch.use_deterministic_algorithms
  bool one_step = false;       // a cell's call
  bool lengths = false;        // of a dense batch
  bool resets = false;
  bool modified = false;        // Problem::modified
  bool offsets_on_host = true;  // those of packed rows, where there are any
  bool empty = false;           // x has no elements
  bool contiguous_states = true;
  bool wide_c = false;  // c of another dtype than x
};

// Why cuDNN cannot serve such a call, as a clause; empty: it can.
std::string cudnn_lacks(const CudnnCall& call);

}  // namespace fused_rnn
