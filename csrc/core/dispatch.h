// A cell known at run time as a template argument.
#pragma once
#include <stdexcept>

#include "core/params.h"

namespace fused_rnn {

// Calls f(std::integral_constant-like tag) whose value is the cell.
template <CellKind kKind>
struct CellTag {
  static constexpr CellKind value = kKind;
};

template <class F>
auto dispatch_cell(CellKind cell, F&& f) {
  switch (cell) {
#define FUSED_RNN_CELL(kind, ...) \
  case CellKind::kind: return f(CellTag<CellKind::kind>{});
    FUSED_RNN_CELLS(FUSED_RNN_CELL)
#undef FUSED_RNN_CELL
  }
  throw std::invalid_argument("unknown cell kind");
}

}  // namespace fused_rnn
