// Products of many rows with a range of panels of a matrix.
#pragma once
#include "cpu/gemm/matrix.h"
#include "cpu/gemm/parts_product.h"

namespace fused_rnn::cpu {

// What the kernel fetches while row block `block` of `blocks` meets panels [p, end): the panels after them, and what their
// hash reads. With a single block memory alone holds the product back, and the processor's own prefetching is faster than
// instructions (1.2 times for one row, 1.1 times for two and for eight rows of a GRU with H=512).
template <class A>
Prefetch prefetch_after(const Product<A>& product, int64_t p, int64_t end, int64_t blocks, int64_t block) {
  const Matrix<A>& m = product.matrix;
  const auto [next, next_end] = product.panels.after(p, end);
  if (blocks == 1 || next >= next_end || !m.far) return {};
  const int64_t columns = m.shape.columns_before(next_end) - m.shape.columns_before(next);
  // Of a matrix that passes, what it is packed from alone.
  const char* from = m.passes() ? nullptr : reinterpret_cast<const char*>(m.packed_panel(next));
  int64_t bytes = m.passes() ? 0 : columns * m.shape.depth * static_cast<int64_t>(sizeof(A));
  if (m.packing == Packing::kBefore) return prefetch_share(from, bytes, blocks, block, m.shape.depth);
  // One range of memory after the other, each for its share of the blocks.
  const PanelSource source = source_of(m, next);
  const int64_t all = bytes + m.shape.gates * source.bytes_of_gate, share = all / blocks;
  int64_t skip = share * block;
  for (int gate = 0; skip >= bytes && gate < m.shape.gates; ++gate) {
    skip -= bytes;
    from = source.of_gate(gate);
    bytes = source.bytes_of_gate;
  }
  return {from + skip, std::min(share, bytes - skip) / m.shape.depth};
}

// Sums of a tile, row block `block` of `blocks`, by the vector kernels; the matrix is direct or packed, in `room` where it
// passes.
template <class A>
void multiply_tile(const Product<A>& product, const Tile<A>& tile, const A* room, int64_t blocks, int64_t block) {
  const Kernels<A>& kernels = product.kernels;
  const Matrix<A>& m = product.matrix;
  const A* const* rows = product.rows + tile.row;
  const int64_t start = m.shape.columns_before(tile.first);
  const A* init = product.init ? product.init + start : nullptr;
  if (m.form == Form::kDirect && !m.straight) {
    const int64_t last = m.shape.columns_before(tile.last) / m.shape.width;
    kernels.direct[storage_index(m.source.storage)]({m.shape.depth, rows, tile.rows, m.source.data, m.shape.units,
                                                     m.shape.gates, start / m.shape.width, last, init, tile.sums,
                                                     tile.stride});
    return;
  }
  GemmCall<A> call{};
  call.depth = m.shape.depth;
  call.rows = rows;
  call.n_rows = tile.rows;
  call.n_panels = static_cast<int>(tile.last - tile.first);
  call.vectors = m.shape.vectors_of(tile.first);
  call.init = init;
  call.out = tile.sums;
  call.out_stride = tile.stride;
  const int64_t columns = int64_t{call.vectors} * m.shape.width;
  if (m.form == Form::kPacked) {
    call.panels = m.passes() ? room : m.packed_panel(tile.first);
    call.k_stride = kernels.together(call.vectors) * m.shape.width;
    call.half_stride = call.k_stride * m.shape.depth;
    call.panel_stride = columns * m.shape.depth;
    // Made here, in registers: what is stored as two words and copied as one of 16 bytes waits for all stores before it.
    call.prefetch = prefetch_after(product, tile.first, tile.last, blocks, block);
  } else {
    call.panels = static_cast<const A*>(m.source.data) + start;
    call.k_stride = m.shape.units;
    call.half_stride = 2 * m.shape.width;
    call.panel_stride = columns;
  }
  kernels.gemm(call);
}

// The tiles of a product with a direct or packed matrix: groups of at most `most` panels, block by block of rows. `place`
// fills in where a tile's sums go, done(tile) is called when they are there.
template <class A, class Place, class Done>
void for_vector_tiles(const Product<A>& product, A* room, int most, const Place& place, const Done& done) {
  const auto& max_rows = product.kernels.max_rows;
  const int group = product.matrix.passes() ? 1 : std::min(product.kernels.max_panels_of(product.n), most);
  for_panel_groups(product.matrix.shape, product.panels, group, [&](int64_t p, int64_t end, int vectors) {
    const int64_t blocks = ceil_div(product.n, max_rows[vectors]);
    int64_t block = 0;
    if (product.matrix.packing == Packing::kLate) pack(product.kernels, product.matrix, p, end);
    if (product.matrix.passes()) pack_passing(product.kernels, product.matrix, p, room);
    for_row_blocks(product.n, max_rows[vectors], [&](int64_t row, int rows) {
      Tile<A> tile{row, rows, p, end, nullptr, 0};
      place(tile);
      multiply_tile(product, tile, room, blocks, block++);
      done(tile);
    });
  });
}

// Room for a tile; a scan has two of them.
constexpr int64_t kTileBytes = int64_t{kMaxTileRows} * kMaxTilePanels * kMaxTileVectors * kMaxVectorBytes;
static_assert(kTileBytes >= 2 * kPartsRows * kMaxTileVectors * kMaxVectorBytes);
static_assert(2 * kTileBytes >= kMostRowBlocks * kPartsRows * kMaxTileVectors * kMaxVectorBytes);

// Cuts the product into tiles and calls f(tile) for each. A tile's sums lie in `tiles` (2 * kTileBytes) until f returns.
template <class A, class F>
void for_tiles(const Product<A>& product, A* tiles, const PartsScratch& scratch, F&& f) {
  if (product.n == 0) return;
  const Shape& shape = product.matrix.shape;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (product.matrix.form == Form::kParts) {
      TilePipeline<F> pipeline(shape, tiles, tiles + kTileBytes / static_cast<int64_t>(sizeof(A)), f);
      PartsProduct<TilePipeline<F>>(product, scratch, pipeline).run();
      pipeline.flush();
      return;
    }
    if (product.matrix.form == Form::kDirectParts) {
      SinkOfTile<F> sink{shape, tiles, f};
      DirectPartsProduct<SinkOfTile<F>>(product, scratch, sink).run();
      return;
    }
  }
  const auto place = [&](Tile<A>& tile) {
    tile.sums = tiles;
    tile.stride = shape.columns_before(tile.last) - shape.columns_before(tile.first);
  };
  for_vector_tiles(product, static_cast<A*>(scratch.room), kMaxTilePanels, place, f);
}

// Products of many rows in memory, either [rows][panels], or [panels][rows], where what is used together lies together. Only
// the first lets a kernel make several panels of a row at a time.
template <class A>
struct ProductStore {
  A* base;
  int64_t row_stride, panel_stride;
  bool rows_first;

  A* at(int64_t row, int64_t panel) const { return base + row * row_stride + panel * panel_stride; }
};

// Stores the product; its first panel is panel 0 of `out`.
template <class A>
void multiply(const Product<A>& product, const PartsScratch& scratch, const ProductStore<A>& out) {
  if (product.n == 0) return;
  const auto place = [&](Tile<A>& tile) {
    tile.sums = out.at(tile.row, tile.first - product.panels.first);
    tile.stride = out.row_stride;
  };
  if constexpr (sizeof(A) == sizeof(float)) {
    if (product.matrix.form == Form::kParts) {
      StoringSink<decltype(place)> sink{place};
      PartsProduct<StoringSink<decltype(place)>>(product, scratch, sink).run();
      return;
    }
    if (product.matrix.form == Form::kDirectParts) {
      StoringSink<decltype(place)> sink{place};
      DirectPartsProduct<StoringSink<decltype(place)>>(product, scratch, sink).run();
      return;
    }
  }
  const int most = out.rows_first ? kMaxTilePanels : 1;
  for_vector_tiles(product, static_cast<A*>(scratch.room), most, place, [](const Tile<A>&) {});
}

// Weights of this size are larger than L2, and so little larger that what stays in it counts.
constexpr int64_t kLeastTurnBytes = 1536 * 1024, kMostTurnBytes = 10 * 1024 * 1024;

// The order of panels for n rows at a step of a scan. Where memory holds the products back, every second step goes the other
// way, because the panels that the step before used last are still in L2. An LSTM with H=512 and 1 to 6 rows is 1.1 to 1.4
// times as fast so; with more rows, or with weights that fit L2, up to 1.05 times slower.
template <class A>
Panels panels_at(const Kernels<A>& kernels, const Matrix<A>& m, int64_t n, const Range& panels, int64_t step) {
  const int64_t columns = m.shape.columns_before(panels.last) - m.shape.columns_before(panels.first);
  const int64_t bytes = columns * m.shape.depth * m.element_size();
  const int64_t block = m.form == Form::kParts ? kPartsRows : kernels.max_rows[m.shape.vectors];
  return {panels.first, panels.last,
          step % 2 == 1 && n <= block && bytes >= kLeastTurnBytes && bytes <= (n == 1 ? 2 : 1) * kMostTurnBytes};
}

}  // namespace fused_rnn::cpu
