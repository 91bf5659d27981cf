// How the columns of a matrix are cut into panels, and in which order a product takes them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/isa/blocks.h"
#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {

// A [depth, units * gates] matrix in panels (kernels.h) of `vectors` vectors. The last panel has `tail` vectors, unless that
// is 0.
struct Shape {
  int64_t depth = 0, units = 0;
  int gates = 1, width = 1, vectors = 1, tail = 0;
  int64_t panels = 0;

  Shape() = default;
  // All gates of W units share a panel; the columns of a one-gate matrix fill panels of four vectors.
  Shape(int64_t depth, int64_t units, int gates, int width) : depth(depth), units(units), gates(gates), width(width) {
    const int64_t all = ceil_div(units, width) * gates;
    vectors = gates == 1 ? kMaxTileVectors : gates;
    tail = static_cast<int>(all % vectors);
    panels = all / vectors + (tail ? 1 : 0);
  }
  int vectors_of(int64_t panel) const { return tail && panel == panels - 1 ? tail : vectors; }
  int64_t columns_before(int64_t panel) const { return std::min(panel * vectors * width, columns()); }
  int64_t columns() const { return tail ? ((panels - 1) * vectors + tail) * width : panels * vectors * width; }
  int64_t unit_vector(int64_t panel) const { return columns_before(panel) / (gates * width); }
  int64_t elements() const { return depth * columns(); }
};

// A vector of a panel: columns of W neighbouring units of one gate.
struct PanelVector {
  int64_t gate, unit;  // of its first column
  int lanes;           // columns that exist; the others are padding
};
inline PanelVector vector_of(const Shape& s, int64_t vector) {
  const int64_t unit = vector / s.gates * s.width;
  return {vector % s.gates, unit, static_cast<int>(std::clamp<int64_t>(s.units - unit, 0, s.width))};
}

// Panels [first, last) of a matrix, and the order in which to take them.
struct Panels {
  int64_t first, last;
  bool descending = false;

  // The panels that come after [p, end), as many or fewer.
  std::pair<int64_t, int64_t> after(int64_t p, int64_t end) const {
    if (descending) return {std::max(first, 2 * p - end), p};
    return {end, std::min(last, 2 * end - p)};
  }
};

// Calls f(begin, end, vectors) for groups of at most `group` panels that one gemm call takes together.
template <class F>
void for_panel_groups(const Shape& shape, const Panels& panels, int64_t group, F&& f) {
  const bool narrow = shape.tail && panels.last == shape.panels && panels.last > panels.first;  // the last goes alone
  const int64_t wide_end = panels.last - (narrow ? 1 : 0);
  const auto tail = [&] {
    if (narrow) f(wide_end, panels.last, shape.tail);
  };
  if (!panels.descending) {
    for (int64_t p = panels.first; p < wide_end; p += group) f(p, std::min(p + group, wide_end), shape.vectors);
    tail();
  } else {
    tail();
    for (int64_t end = wide_end; end > panels.first; end -= group)
      f(std::max(end - group, panels.first), end, shape.vectors);
  }
}

}  // namespace fused_rnn::cpu
