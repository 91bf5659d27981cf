// Packed matrices, and the product of many rows with a range of panels.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <utility>

#include "cpu/arena.h"
#include "cpu/gemm/weight_cache.h"
#include "cpu/isa/blocks.h"
#include "cpu/isa/kernels.h"
#include "cpu/plan.h"

namespace fused_rnn::cpu {

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

// Panels [first, last) of a matrix, and the order in which to take them.
struct Panels {
  int64_t first, last;
  bool descending = false;

  // The panels next to [p, end), up to as many.
  std::pair<int64_t, int64_t> after(int64_t p, int64_t end) const {
    if (descending) return {std::max(first, 2 * p - end), p};
    return {end, std::min(last, 2 * end - p)};
  }
};

// Calls f(begin, end, vectors) for groups of panels that one gemm call on n rows takes together, at most `most`.
template <class F>
void for_panel_groups(const Shape& shape, int64_t n, const Panels& panels, int most, F&& f) {
  const int64_t group = n <= 2 ? std::min(max_panels(static_cast<int>(n)), most) : 1;
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

// A matrix to multiply rows with. `source` is torch's: [gates, units, K] (transposed into the panels), or [K, units] (straight).
template <class A>
struct Matrix {
  Shape shape;
  Form form = Form::kDirect;
  bool straight = false;
  int storage = 0;
  const void* source = nullptr;
  A* packed = nullptr;
  SplitParts parts;
  uint16_t* split = nullptr;
  std::atomic<bool>* infinite = nullptr;  // split: an element has no parts
  KeptMatrix* kept = nullptr;             // where packed or split is from, if it outlasts the call

  int64_t packed_elements() const { return form == Form::kPacked ? shape.elements() : 0; }
  int64_t vector_elements() const { return split_blocks(shape.depth) * parts.panels * kSplitTile; }
  int64_t split_elements() const { return form == Form::kSplit ? shape.columns() / shape.width * vector_elements() : 0; }
  int64_t kept_bytes() const {
    return packed_elements() * static_cast<int64_t>(sizeof(A)) + split_elements() * static_cast<int64_t>(sizeof(uint16_t));
  }
  // What choose_plan wants to know: bytes of an element, and pairs of parts.
  int64_t element_size() const { return form == Form::kSplit ? parts.panels * int64_t{2} : int64_t{sizeof(A)}; }
  int products() const { return form == Form::kSplit ? split_products(parts) : 0; }
  int64_t row_block_elements() const { return split_blocks(shape.depth) * parts.rows * kSplitTile; }
};

// Makes panels [first, last) of a packed or split matrix from its source; of a kept one those whose source has changed.
template <class A>
void pack(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last);

// Columns of panels [p, end) for up to max_rows rows; not for a split matrix.
template <class A>
void multiply_tile(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int n_rows, int64_t p,
                   int64_t end, A* out, int64_t out_stride, const Prefetch& prefetch) {
  const int64_t start = m.shape.columns_before(p);
  const A* start_init = init ? init + start : nullptr;
  const int64_t columns = m.shape.vectors_of(p) * m.shape.width;
  if (m.form == Form::kPacked) {
    kernels.gemm({m.shape.depth, rows, n_rows, static_cast<int>(end - p), m.shape.vectors_of(p),
                  m.packed + start * m.shape.depth, columns, columns * m.shape.depth, start_init, out, out_stride,
                  prefetch});
  } else if (m.straight) {
    kernels.gemm({m.shape.depth,
                  rows,
                  n_rows,
                  static_cast<int>(end - p),
                  m.shape.vectors_of(p),
                  static_cast<const A*>(m.source) + start,
                  m.shape.units,
                  columns,
                  start_init,
                  out,
                  out_stride,
                  {}});
  } else {
    const int64_t last = m.shape.columns_before(end) / m.shape.width;
    kernels.direct[m.storage]({m.shape.depth, rows, n_rows, m.source, m.shape.units, m.shape.gates, start / m.shape.width,
                               last, start_init, out, out_stride});
  }
}

// Smaller matrices stay in L2 by themselves.
constexpr int64_t kPrefetchBytes = 1280 * 1024;

// While row block `block` of `blocks` meets panels [p, end): what follows them. A single block is held back by memory alone, and there
// the processor's own prefetching is faster than instructions (1.2 times for one row, 1.1 for two and for eight of a GRU with H=512).
template <class A>
Prefetch next_panels(const Matrix<A>& m, const Panels& panels, int64_t p, int64_t end, int64_t blocks, int64_t block) {
  const bool far = m.packed_elements() * static_cast<int64_t>(sizeof(A)) >= kPrefetchBytes;
  const auto [next, next_end] = panels.after(p, end);
  if (blocks == 1 || next >= next_end || !far) return {};
  const int64_t start = m.shape.columns_before(next);
  const int64_t bytes = (m.shape.columns_before(next_end) - start) * m.shape.depth * static_cast<int64_t>(sizeof(A));
  return prefetch_share(m.packed + start * m.shape.depth, bytes, blocks, block, m.shape.depth);
}

// Columns of a panel for a row with an infinite value, or of a matrix with one.
template <class A>
void multiply_infinite(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* row, int64_t p, A* out);

// Rows made ready for a split matrix, of one thread.
struct SplitRows {
  uint16_t* packed = nullptr;
  int64_t elements = 0;  // that it has room for
  uint32_t* infinite = nullptr;
  int64_t blocks = 0;
};

// For blocks of at most 16 rows and each panel of a split matrix: place(first_row, panel) says where the product
// goes (an address and a stride), done(first_row, rows, panel, address, stride) is called when it is there.
template <class A, class Place, class Done>
void for_split_blocks(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n,
                      const Panels& panels, const SplitRows& scratch, const Background& background, Place&& place,
                      Done&& done) {
  if constexpr (sizeof(A) == sizeof(float)) {
    const bool matrix_infinite = m.infinite->load(std::memory_order_relaxed);
    const int64_t blocks = std::min(scratch.blocks, scratch.elements / m.row_block_elements());
    // Full blocks, then the rest: the matrix unit is configured for a number of rows, and that costs time.
    for_blocks(n, blocks * kSplitRows, [&](int64_t group, int64_t group_rows) {
      int64_t block = 0;
      for_blocks(group_rows, kSplitRows, [&](int64_t begin, int64_t rows_here) {
        const int count = static_cast<int>(rows_here);
        scratch.infinite[block] = kernels.split->pack_rows(rows + group + begin, count, m.shape.depth, m.parts.rows,
                                                           scratch.packed + block * m.row_block_elements());
        if (matrix_infinite) scratch.infinite[block] = ~0u;
        ++block;
      });
      const auto panel_at = [&](int64_t p) {
        return m.split + m.shape.columns_before(p) / m.shape.width * m.vector_elements();
      };
      for (int64_t i = panels.first; i < panels.last; ++i) {
        const int64_t p = panels.descending ? panels.first + panels.last - 1 - i : i;
        const int64_t column = m.shape.columns_before(p);
        const uint16_t* panel = panel_at(p);
        const auto [following, end] = panels.after(p, p + 1);
        const int pair = m.shape.vectors_of(p) % 2 == 0 && group_rows >= 2 * kSplitRows ? 2 : 1;
        const int64_t calls = (group_rows + pair * kSplitRows - 1) / (pair * kSplitRows);
        // A panel that is read once is held back by memory alone, as next_panels says: without prefetching 16 rows of H=256 take 0.9 of
        // the time, one row 0.85 (LSTM, fp32, AMX).
        const bool once = calls == 1 && pair == 1 && kernels.split->reads_once;
        const bool fetch = !once && following < end && m.split_elements() * 2 > kPrefetchBytes;
        const void* next = fetch ? panel_at(following) : nullptr;
        const int64_t next_bytes = fetch ? m.shape.vectors_of(following) * m.vector_elements() * 2 : 0;
        int64_t call = 0;
        block = 0;
        const auto product = [&](int64_t begin, int count) {
          const auto [out, stride] = place(group + begin, p);
          kernels.split->gemm(
              {m.shape.depth, m.parts, scratch.packed + block * m.row_block_elements(), count, m.shape.vectors_of(p), panel,
               init ? init + column : nullptr, /*add=*/false, out, stride,
               prefetch_share(next, next_bytes, calls, std::min(call++, calls - 1), split_blocks(m.shape.depth)),
               background});
          for (int r = 0; r < count; ++r) {
            if (scratch.infinite[block + r / kSplitRows] >> r % kSplitRows & 1) {
              multiply_infinite(kernels, m, init, rows[group + begin + r], p, out + r * stride);
            }
          }
          done(group + begin, count, p, out, stride);
          block += (count + kSplitRows - 1) / kSplitRows;
        };
        int64_t begin = 0;
        for (; pair == 2 && begin + 2 * kSplitRows <= group_rows; begin += 2 * kSplitRows) product(begin, 2 * kSplitRows);
        for (; begin < group_rows; begin += kSplitRows) {
          product(begin, static_cast<int>(std::min<int64_t>(kSplitRows, group_rows - begin)));
        }
      }
    });
  }
}

// Weights of this size are larger than L2, and not so much larger that what stays in it does not count.
constexpr int64_t kLeastTurnBytes = 1536 * 1024, kMostTurnBytes = 10 * 1024 * 1024;

// The order of panels for n rows at a step of a scan. Where memory holds the products back, every second step goes the other way: the
// panels that the step before used last are still in L2 (1 to 6 rows of an LSTM with H=512: 1.1 to 1.4 times as fast; with more rows,
// or in L2, up to 1.05 times slower).
template <class A>
Panels panels_at(const Kernels<A>& kernels, const Matrix<A>& m, int64_t n, int64_t first, int64_t last, int64_t step) {
  const int64_t columns = m.shape.columns_before(last) - m.shape.columns_before(first);
  const int64_t bytes = columns * m.shape.depth * m.element_size();
  const int64_t block = m.form == Form::kSplit ? kSplitRows : kernels.max_rows[m.shape.vectors];
  return {first, last,
          step % 2 == 1 && n <= block && bytes >= kLeastTurnBytes && bytes <= (n == 1 ? 2 : 1) * kMostTurnBytes};
}

// Room for a tile; a scan has two of them.
constexpr int64_t kTileBytes = int64_t{kMaxTileRows} * kMaxTilePanels * kMaxTileVectors * kMaxVectorBytes;
static_assert(kTileBytes >= 2 * kSplitRows * kMaxTileVectors * kMaxVectorBytes);

// for_tiles of a split matrix: f runs on a tile's rows while the matrix unit makes the next tile.
template <class A, class F>
void for_pipelined_tiles(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n,
                         const Panels& panels, A* tile, const SplitRows& scratch, F& f) {
  struct Pending {
    F& f;
    int64_t begin = 0, count = 0, panel = 0, stride = 0;
    const A* tile = nullptr;

    void run(int64_t round, int64_t rounds) {
      const int64_t r = share_begin(count, rounds, round), rows = share_begin(count, rounds, round + 1) - r;
      if (rows > 0) f(begin + r, static_cast<int>(rows), panel, panel + 1, tile + r * stride, stride);
    }
  } pending{f};
  const Background background{
      [](void* context, int64_t round, int64_t rounds) { static_cast<Pending*>(context)->run(round, rounds); }, &pending};
  A* const tiles[] = {tile, tile + kTileBytes / static_cast<int64_t>(sizeof(A))};
  int next = 0;
  const auto place = [&](int64_t, int64_t p) {
    return std::pair<A*, int64_t>(tiles[next], m.shape.vectors_of(p) * m.shape.width);
  };
  const auto done = [&](int64_t begin, int count, int64_t p, const A* out, int64_t stride) {
    pending.begin = begin, pending.count = count, pending.panel = p, pending.stride = stride, pending.tile = out;
    next = 1 - next;
  };
  for_split_blocks(kernels, m, init, rows, n, panels, scratch, background, place, done);
  pending.run(0, 1);
}

// For the panels, group by group, then row block by row block: fills a tile (kTileBytes) and calls
// f(first_row, rows, first_panel, last_panel, tile, tile_stride).
template <class A, class F>
void for_tiles(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n,
               const Panels& panels, A* tile, const SplitRows& scratch, F&& f) {
  if (n == 0) return;
  if (m.form == Form::kSplit) {
    for_pipelined_tiles(kernels, m, init, rows, n, panels, tile, scratch, f);
    return;
  }
  for_panel_groups(m.shape, n, panels, kMaxTilePanels, [&](int64_t p, int64_t end, int vectors) {
    const int64_t stride = m.shape.columns_before(end) - m.shape.columns_before(p);
    const int64_t blocks = (n + kernels.max_rows[vectors] - 1) / kernels.max_rows[vectors];
    int64_t block = 0;
    for_row_blocks(n, kernels.max_rows[vectors], [&](int64_t begin, int count) {
      multiply_tile(kernels, m, init, rows + begin, count, p, end, tile, stride,
                    next_panels(m, panels, p, end, blocks, block++));
      f(begin, count, p, end, tile, stride);
    });
  });
}

// Products of many rows: [rows][panels] (what several panels at a time need), or [panels][rows], where neighbours in use are
// neighbours in memory.
template <class A>
struct Products {
  A* base;
  int64_t row_stride, panel_stride;
  bool rows_first;

  A* at(int64_t row, int64_t panel) const { return base + row * row_stride + panel * panel_stride; }
};

// Products of n rows with the panels on the bias `init`.
template <class A>
void multiply(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* const* rows, int64_t n,
              const Panels& panels, const SplitRows& scratch, const Products<A>& out) {
  if (n == 0) return;
  if (m.form == Form::kSplit) {
    const auto place = [&](int64_t begin, int64_t p) {
      return std::pair<A*, int64_t>(out.at(begin, p - panels.first), out.row_stride);
    };
    for_split_blocks(kernels, m, init, rows, n, panels, scratch, {}, place, [](auto...) {});
    return;
  }
  for_panel_groups(m.shape, n, panels, out.rows_first ? kMaxTilePanels : 1, [&](int64_t p, int64_t end, int vectors) {
    const int64_t blocks = (n + kernels.max_rows[vectors] - 1) / kernels.max_rows[vectors];
    int64_t block = 0;
    for_row_blocks(n, kernels.max_rows[vectors], [&](int64_t begin, int count) {
      multiply_tile(kernels, m, init, rows + begin, count, p, end, out.at(begin, p - panels.first), out.row_stride,
                    next_panels(m, panels, p, end, blocks, block++));
    });
  });
}

// ---- which form ----

// How much of a thread's L2 the rows of a split product may take; more of it for up to 256 rows, for which each panel is read once.
constexpr int64_t kSplitRowsBytes = 768 * 1024, kMostSplitRowsBytes = 1536 * 1024, kSplitGroup = 256 / kSplitRows;

template <class A>
int64_t split_row_blocks(const Matrix<A>& m, int64_t rows) {
  if (m.form != Form::kSplit || m.shape.panels == 0) return 0;
  const int64_t bytes = m.row_block_elements() * 2;
  const int64_t most = std::max({kSplitRowsBytes / bytes, std::min(kMostSplitRowsBytes / bytes, kSplitGroup), int64_t{1}});
  return std::min((rows + kSplitRows - 1) / kSplitRows, most);
}

// Room for the rows of several matrices, one at a time.
struct SplitRoom {
  int64_t blocks = 0, elements = 0;

  template <class A>
  void include(const Matrix<A>& m, int64_t rows) {
    const int64_t needed = split_row_blocks(m, rows);
    blocks = std::max(blocks, needed);
    elements = std::max(elements, needed * m.row_block_elements());
  }
  SplitRows take(Arena& arena) const {
    uint16_t* packed = arena.take<uint16_t>(elements);
    return {packed, elements, arena.take<uint32_t>(blocks), blocks};
  }
};

}  // namespace fused_rnn::cpu
