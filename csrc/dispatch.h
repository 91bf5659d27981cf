// Run-time cell and dtype to template arguments: the only switches on either.
#pragma once
#include <stdexcept>

#include "params.h"

namespace fused_rnn {

// Calls f(std::integral_constant-like tag) whose value is the cell.
template <CellKind kKind>
struct CellTag {
  static constexpr CellKind value = kKind;
};

template <class F>
auto dispatch_cell(CellKind cell, F&& f) {
  switch (cell) {
    case CellKind::kRnnTanh: return f(CellTag<CellKind::kRnnTanh>{});
    case CellKind::kRnnRelu: return f(CellTag<CellKind::kRnnRelu>{});
    case CellKind::kRnnIdentity: return f(CellTag<CellKind::kRnnIdentity>{});
    case CellKind::kLstm: return f(CellTag<CellKind::kLstm>{});
    case CellKind::kGru: return f(CellTag<CellKind::kGru>{});
  }
  throw std::invalid_argument("unknown cell kind");
}

}  // namespace fused_rnn
