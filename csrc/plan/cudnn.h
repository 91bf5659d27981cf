// What family `cudnn` has of our cells.
#pragma once
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

}  // namespace fused_rnn
