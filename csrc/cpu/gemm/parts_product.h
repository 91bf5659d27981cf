// Products of rows with a matrix in bfloat16 parts (parts.h).
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/arena.h"
#include "cpu/gemm/matrix.h"

namespace fused_rnn::cpu {

// A thread's room for a product: for rows in parts, and for a panel.
struct PartsScratch {
  uint16_t* packed = nullptr;
  int64_t elements = 0;          // of packed
  uint32_t* infinite = nullptr;  // [blocks], of each block of 16 rows a bit for every row that has a value without parts
  int64_t blocks = 0;
  float* rows = nullptr;  // a row as float; of weights as they lie 16 rows, one after the other
  void* room = nullptr;   // for a panel of a matrix that passes (matrix.h)
};

// Whether a value has parts.
inline bool has_parts(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7fffffff) < kLeastWithoutParts;
}

// A row of the product; where it is stored in another type, in `room`.
inline const float* row_as_float(const Product<float>& product, int64_t row, float* room) {
  if (!product.stored) return product.rows[row];
  product.kernels.load[product.storage](product.stored[row], room, product.matrix.shape.depth);
  return room;
}

// A product in parts, in three loops. Rows are packed in blocks of 16, a group of blocks at a time: as many as the scratch
// holds. Each panel then meets the whole group, so that it is read from memory once for the group. A call of the kernel
// takes one block, or two where the kernel can.
//
// Sink:  void place(Tile<float>&)          fills in where the sums of a tile go
//        void done(const Tile<float>&)     the sums are there
//        Background background()           what the kernel does while it waits for the matrix unit
template <class Sink>
class PartsProduct {
 public:
  PartsProduct(const Product<float>& product, const PartsScratch& scratch, Sink& sink)
      : product_(product),
        m_(product.matrix),
        kernels_(*product.kernels.parts),
        scratch_(scratch),
        sink_(sink),
        matrix_infinite_(m_.infinite->load(std::memory_order_relaxed)) {}

  void run() {
    const int64_t blocks = std::min(scratch_.blocks, scratch_.elements / m_.row_block_elements());
    const Panels& panels = product_.panels;
    for (int64_t row = 0; row < product_.n; row += blocks * kPartsRows) {
      const Group group{row, std::min(blocks * kPartsRows, product_.n - row)};
      pack_rows(group);
      for (int64_t i = panels.first; i < panels.last; ++i) {
        multiply_panel(group, panels.descending ? panels.first + panels.last - 1 - i : i);
      }
    }
  }

 private:
  // Rows [first, first + rows) of the product, packed.
  struct Group {
    int64_t first, rows;
  };

  // All blocks are full but the last: the matrix unit is configured for a number of rows, and that costs time.
  void pack_rows(const Group& group) const {
    for (int64_t row = 0, block = 0; row < group.rows; row += kPartsRows, ++block) {
      const int rows = static_cast<int>(std::min<int64_t>(kPartsRows, group.rows - row));
      const void* from[kPartsRows];
      for (int r = 0; r < rows; ++r) from[r] = row_at(group.first + row + r);
      const uint32_t infinite = kernels_.pack_rows[product_.storage](from, rows, m_.shape.depth, m_.parts.rows,
                                                                     scratch_.packed + block * m_.row_block_elements());
      scratch_.infinite[block] = matrix_infinite_ ? ~0u : infinite;
    }
  }

  const void* row_at(int64_t row) const { return product_.stored ? product_.stored[row] : product_.rows[row]; }

  void multiply_panel(const Group& group, int64_t panel) {
    const bool pairs = m_.shape.vectors_of(panel) % 2 == 0 && group.rows >= 2 * kPartsRows;
    const int64_t calls = ceil_div(group.rows, pairs ? 2 * kPartsRows : kPartsRows);
    // Memory alone holds a panel back that is read once, as in prefetch_after: without prefetching 16 rows of H=256 take 0.9
    // of the time, one row 0.85 (LSTM, fp32, AMX).
    const bool once = calls == 1 && !pairs && kernels_.reads_once;
    const Fetch fetch = once ? Fetch{} : fetch_after(panel);
    int64_t call = 0;
    for (int64_t row = 0; row < group.rows; ++call) {
      const int64_t left = group.rows - row;
      const int rows =
          static_cast<int>(pairs && left >= 2 * kPartsRows ? 2 * kPartsRows : std::min<int64_t>(left, kPartsRows));
      const Prefetch prefetch =
          prefetch_share(fetch.from, fetch.bytes, calls, std::min(call, calls - 1), depth_blocks(m_.shape.depth));
      multiply_blocks(group, row, rows, panel, prefetch);
      row += rows;
    }
  }

  // What to bring into L2 while a panel is in use.
  struct Fetch {
    const void* from = nullptr;
    int64_t bytes = 0;
  };
  Fetch fetch_after(int64_t panel) const {
    const auto [next, end] = product_.panels.after(panel, panel + 1);
    if (next >= end || !m_.far) return {};
    return {m_.tiles_of(next), m_.shape.vectors_of(next) * m_.vector_elements() * 2};
  }

  // One call of the kernel: rows [row, row + rows) of the group, with a panel.
  void multiply_blocks(const Group& group, int64_t row, int rows, int64_t panel, const Prefetch& prefetch) {
    const int64_t block = row / kPartsRows;
    Tile<float> tile{group.first + row, rows, panel, panel + 1, nullptr, 0};
    sink_.place(tile);
    PartsCall call{};
    call.depth = m_.shape.depth;
    call.parts = m_.parts;
    call.rows = scratch_.packed + block * m_.row_block_elements();
    call.n_rows = rows;
    call.vectors = m_.shape.vectors_of(panel);
    call.panel = m_.tiles_of(panel);
    call.init = product_.init ? product_.init + m_.shape.columns_before(panel) : nullptr;
    call.add = false;
    call.out = tile.sums;
    call.out_stride = tile.stride;
    call.prefetch = prefetch;
    call.background = sink_.background();
    kernels_.gemm(call);
    replace_infinite(tile, block);
    sink_.done(tile);
  }

  // Sums of rows that have a value without parts are made again, from the source.
  void replace_infinite(const Tile<float>& tile, int64_t block) const {
    const uint32_t second = tile.rows > kPartsRows ? scratch_.infinite[block + 1] : 0;
    if ((scratch_.infinite[block] | second) == 0) return;
    for (int r = 0; r < tile.rows; ++r) {
      if (!(scratch_.infinite[block + r / kPartsRows] >> r % kPartsRows & 1)) continue;
      multiply_infinite(product_.kernels, m_, product_.init, row_as_float(product_, tile.row + r, scratch_.rows), tile.first,
                        tile.sums + r * tile.stride);
    }
  }

  const Product<float>& product_;
  const Matrix<float>& m_;
  const PartsKernels& kernels_;
  const PartsScratch& scratch_;
  Sink& sink_;
  const bool matrix_infinite_;
};

// A sink that leaves the sums where `place` puts them.
template <class Place>
struct StoringSink {
  const Place& place;
  static void done(const Tile<float>&) {}
  static Background background() { return {}; }
};

// A sink that hands each tile to f, from one place.
template <class F>
struct SinkOfTile {
  const Shape& shape;
  float* sums;
  F& f;
  void place(Tile<float>& tile) const {
    tile.sums = sums;
    tile.stride = shape.vectors_of(tile.first) * shape.width;
  }
  void done(const Tile<float>& tile) const { f(tile); }
};

// A sink with two tiles that take turns: f runs on the rows of a finished tile while the matrix unit makes the next one.
template <class F>
class TilePipeline {
 public:
  TilePipeline(const Shape& shape, float* first, float* second, F& f) : shape_(shape), room_{first, second}, f_(f) {}

  void place(Tile<float>& tile) const {
    tile.sums = room_[next_];
    tile.stride = shape_.vectors_of(tile.first) * shape_.width;
  }
  void done(const Tile<float>& tile) {
    finished_ = tile;
    next_ = 1 - next_;
  }
  Background background() {
    return {[](void* self, int64_t round, int64_t rounds) { static_cast<TilePipeline*>(self)->run(round, rounds); }, this};
  }
  // The last tile has no tile after it.
  void flush() { run(0, 1); }

 private:
  static constexpr int kInStep = 4;
  // f on the rows that fall to a round: fours, which the pointwise half takes in step (kInStep of AVX-512, whose vectors
  // work beside every unit that multiplies parts).
  void run(int64_t round, int64_t rounds) {
    const auto [first, last] = share_of(ceil_div(finished_.rows, kInStep), rounds, round);
    if (first == last) return;
    const int64_t begin = first * kInStep, end = std::min<int64_t>(last * kInStep, finished_.rows);
    Tile<float> some = finished_;
    some.row += begin;
    some.rows = static_cast<int>(end - begin);
    some.sums += begin * some.stride;
    f_(some);
  }

  const Shape& shape_;
  float* const room_[2];
  F& f_;
  int next_ = 0;
  Tile<float> finished_{};
};

// ---- weights as they lie ----

// Blocks of rows that meet the weights at a time: the kernel takes 1, 2 or 4.
constexpr int64_t direct_blocks(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kPartsRows);
  return blocks <= 2 ? blocks : kMostRowBlocks;
}

// A product of rows with a matrix as it lies, cut into parts on the way. Up to 64 rows meet all panels, so that the weights
// are read from memory once for them.
template <class Sink>
class DirectPartsProduct {
 public:
  DirectPartsProduct(const Product<float>& product, const PartsScratch& scratch, Sink& sink)
      : product_(product), m_(product.matrix), kernels_(*product.kernels.parts), scratch_(scratch), sink_(sink) {}

  void run() {
    constexpr int64_t kMost = kMostRowBlocks * kPartsRows;
    for (int64_t row = 0; row < product_.n; row += kMost) {
      const int rows = static_cast<int>(std::min(kMost, product_.n - row));
      pack_rows(row, rows);
      for (int64_t panel = product_.panels.first; panel < product_.panels.last; ++panel) multiply_panel(row, rows, panel);
    }
  }

 private:
  void pack_rows(int64_t first, int n) {
    const int64_t depth = m_.shape.depth;
    infinite_ = 0;
    for (int64_t block = 0; block < direct_blocks(n); ++block) {
      const int lanes = static_cast<int>(std::clamp<int64_t>(n - block * kPartsRows, 0, kPartsRows));
      for (int r = 0; r < lanes; ++r) {
        float* const to = scratch_.rows + r * depth;
        const float* const row = row_as_float(product_, first + block * kPartsRows + r, to);
        if (row != to) std::copy_n(row, depth, to);
      }
      const PartsSource source{scratch_.rows, depth, lanes, depth};
      uint16_t* const to = scratch_.packed + block * m_.row_block_elements();
      if (kernels_.pack_transposed[0](source, m_.parts.rows, to, m_.parts.rows * kPartsTile)) continue;
      for (int r = 0; r < lanes; ++r) {
        const float* const row = scratch_.rows + r * depth;
        if (!std::all_of(row, row + depth, has_parts)) infinite_ |= uint64_t{1} << (block * kPartsRows + r);
      }
    }
  }

  void multiply_panel(int64_t row, int rows, int64_t panel) {
    const Shape& s = m_.shape;
    Tile<float> tile{row, rows, panel, panel + 1, nullptr, 0};
    sink_.place(tile);
    DirectPartsCall call{};
    call.depth = s.depth;
    call.parts = m_.parts;
    call.rows = scratch_.packed;
    call.block_elements = m_.row_block_elements();
    call.blocks = static_cast<int>(direct_blocks(rows));
    call.n_rows = rows;
    call.out_stride = tile.stride;
    const int all = s.vectors_of(panel), most = kMostRowBlocks / call.blocks;
    bool finite = true;  // the panel's weights
    for (int first = 0; first < all; first += call.vectors) {
      call.vectors = std::min(most, all - first);
      const int64_t start = s.columns_before(panel) + first * s.width;
      for (int v = 0; v < call.vectors; ++v) {
        const auto [gate, unit, lanes] = vector_of(s, start / s.width + v);
        call.weights[v] = stored_at(m_.source.data, (gate * s.units + unit) * s.depth, dtype_size(m_.source.storage));
        call.lanes[v] = lanes;
      }
      call.init = product_.init ? product_.init + start : nullptr;
      call.out = tile.sums + first * s.width;
      finite &= kernels_.direct[storage_index(m_.source.storage)](call);
    }
    for (int r = 0; r < rows && (infinite_ || !finite); ++r) {
      if (finite && !(infinite_ >> r & 1)) continue;
      multiply_infinite(product_.kernels, m_, product_.init, row_as_float(product_, row + r, scratch_.rows), panel,
                        tile.sums + r * tile.stride);
    }
    sink_.done(tile);
  }

  const Product<float>& product_;
  const Matrix<float>& m_;
  const PartsKernels& kernels_;
  const PartsScratch& scratch_;
  Sink& sink_;
  uint64_t infinite_ = 0;  // a bit for each packed row that has a value without parts
};

// ---- room ----

// How much of a thread's L2 packed rows may take. Up to 256 rows may take more, because each panel is then read once.
constexpr int64_t kPartsRowsBytes = 768 * 1024, kMostPartsRowsBytes = 1536 * 1024, kPartsGroup = 256 / kPartsRows;

// Blocks of rows that are packed at a time.
template <class A>
int64_t row_blocks_of_group(const Matrix<A>& m, int64_t rows) {
  if (m.shape.panels == 0) return 0;
  if (m.form == Form::kDirectParts) return direct_blocks(std::min(rows, kMostRowBlocks * int64_t{kPartsRows}));
  if (m.form != Form::kParts) return 0;
  const int64_t bytes = m.row_block_elements() * 2;
  const int64_t most = std::max({kPartsRowsBytes / bytes, std::min(kMostPartsRowsBytes / bytes, kPartsGroup), int64_t{1}});
  return std::min(ceil_div(rows, kPartsRows), most);
}

// The size of a scratch that serves several matrices in turn.
struct PartsRoom {
  int64_t blocks = 0, elements = 0, floats = 0, room_bytes = 0;

  template <class A>
  void include(const Matrix<A>& m, int64_t rows) {
    const int64_t needed = row_blocks_of_group(m, rows);
    blocks = std::max(blocks, needed);
    elements = std::max(elements, needed * m.row_block_elements());
    room_bytes = std::max(room_bytes, m.room_elements() * static_cast<int64_t>(sizeof(A)));
    if (needed > 0) floats = std::max(floats, (m.form == Form::kDirectParts ? kPartsRows : 1) * m.shape.depth);
  }
  PartsScratch take(Arena& arena) const {
    uint16_t* packed = arena.take<uint16_t>(elements);
    uint32_t* infinite = arena.take<uint32_t>(blocks);
    float* const rows = arena.take<float>(floats);
    return {packed, elements, infinite, blocks, rows, arena.take<char>(room_bytes)};
  }
};

}  // namespace fused_rnn::cpu
