// Tile sizes as compile-time constants, for the files that say which kernel serves a role.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "cuda/device/kernel_cell.h"
#include "plan/step_geometry.h"

namespace fused_rnn::cuda {

// Kernels whose code does not depend on the cell are compiled once, under the first of the list.
constexpr CellKind kAnyCell = CellKind{0};

// Calls f with the tile size as a compile-time constant.
template <MathKind kMath, class F>
auto dispatch_tile(TileSize size, F&& f) {
  switch (size) {
    case TileSize::kSmall: return f(std::integral_constant<TileSize, TileSize::kSmall>{});
    case TileSize::kMedium: return f(std::integral_constant<TileSize, TileSize::kMedium>{});
    case TileSize::kLarge:
      if constexpr (has_tile(kMath, TileSize::kLarge)) {
        return f(std::integral_constant<TileSize, TileSize::kLarge>{});
      }
      break;
    case TileSize::kPointwise: break;  // of another family
  }
  throw std::invalid_argument("no kernel of this arithmetic has such a tile");
}

}  // namespace fused_rnn::cuda
