// Packed matrices, the arena that workspaces are laid out with, and the product of many rows with a range of panels.
#pragma once
#include <algorithm>
#include <cstddef>

#include "kernels.h"
#include "plan.h"

namespace fused_rnn::cpu {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Lays arrays out one after the other from a base address; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class E>
  E* take(int64_t count) {
    E* at = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A packed [depth, units * gates] matrix (kernels.h): panels of `vectors` vectors, the last of `tail` if that is not 0.
struct Shape {
  int64_t depth = 0, units = 0;
  int gates = 1, width = 1, vectors = 1, tail = 0;
  int64_t panels = 0;

  Shape() = default;
  // All gates of W units share a panel; the columns of a one-gate matrix fill panels of four vectors.
  Shape(int64_t depth, int64_t units, int gates, int width) : depth(depth), units(units), gates(gates), width(width) {
    const int64_t all = (units + width - 1) / width * gates;
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

// One direction's weights as gate matrix panels: from [gates, units, depth] row-major (transposed into the panels), or from
// [depth, units] row-major (gates == 1, straight). Packs panels [first, last).
template <class A>
void pack_transposed(const Shape& shape, DType dtype, const void* from, int64_t first, int64_t last, A* to);
template <class A>
void pack_straight(const Shape& shape, DType dtype, const void* from, int64_t first, int64_t last, A* to);

// Calls f(first_row, rows) for balanced blocks of at most `most` of n rows.
template <class F>
void for_row_blocks(int64_t n, int most, F&& f) {
  const int64_t blocks = (n + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = share_begin(n, blocks, i);
    f(begin, static_cast<int>(share_begin(n, blocks, i + 1) - begin));
  }
}

// Calls f(begin, end, vectors) for groups of panels of [first, last) that one gemm call on n rows takes together.
template <class F>
void for_panel_groups(const Shape& shape, int64_t n, int64_t first, int64_t last, F&& f) {
  const int group = n <= 2 ? max_panels(static_cast<int>(n)) : 1;
  for (int64_t p = first; p < last;) {
    int64_t end = std::min(p + group, last);
    if (shape.tail && end == shape.panels && end - p > 1) --end;  // the narrower panel goes alone
    f(p, end, shape.vectors_of(p));
    p = end;
  }
}

// A matrix to multiply rows with: packed, or as torch keeps it.
template <class A>
struct Matrix {
  Shape shape;
  A* packed = nullptr;           // [panels][K][vectors][W]
  const void* direct = nullptr;  // [gates, units, K] storage; used where not null
  int storage = 0;
};

// Columns of panels [p, end) for up to max_rows rows.
template <class A>
void multiply_tile(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int n_rows, int64_t p,
                   int64_t end, A* out, int64_t out_stride) {
  const int64_t start = m.shape.columns_before(p);
  const A* start_init = init ? init + start : nullptr;
  if (m.direct) {
    const int64_t last = m.shape.columns_before(end) / m.shape.width;
    kernels.direct[m.storage]({m.shape.depth, rows, n_rows, m.direct, m.shape.units, m.shape.gates, start / m.shape.width,
                               last, start_init, out, out_stride});
  } else {
    kernels.gemm({m.shape.depth, rows, n_rows, static_cast<int>(end - p), m.shape.vectors_of(p),
                  m.packed + start * m.shape.depth, start_init, out, out_stride});
  }
}

// For panels [first, last), panel group by panel group, then row block by row block: fills a tile (kTileBytes) and calls
// f(first_row, rows, first_panel, last_panel, tile, tile_stride).
constexpr int64_t kTileBytes = int64_t{kMaxTileRows} * kMaxTilePanels * kMaxTileVectors * kMaxVectorBytes;
template <class A, class F>
void for_tiles(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n, int64_t first,
               int64_t last, A* tile, F&& f) {
  if (n == 0) return;
  for_panel_groups(m.shape, n, first, last, [&](int64_t p, int64_t end, int vectors) {
    const int64_t stride = m.shape.columns_before(end) - m.shape.columns_before(p);
    for_row_blocks(n, kernels.max_rows[vectors], [&](int64_t begin, int count) {
      multiply_tile(kernels, m, init, rows + begin, count, p, end, tile, stride);
      f(begin, count, p, end, tile, stride);
    });
  });
}

// out[row][columns of the panels] = init + rows * matrix, written straight to out.
template <class A>
void multiply(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n, int64_t first,
              int64_t last, A* out, int64_t out_stride) {
  if (n == 0) return;
  const int64_t begin_column = m.shape.columns_before(first);
  for_panel_groups(m.shape, n, first, last, [&](int64_t p, int64_t end, int vectors) {
    A* columns = out + m.shape.columns_before(p) - begin_column;
    for_row_blocks(n, kernels.max_rows[vectors], [&](int64_t begin, int count) {
      multiply_tile(kernels, m, init, rows + begin, count, p, end, columns + begin * out_stride, out_stride);
    });
  });
}

}  // namespace fused_rnn::cpu
