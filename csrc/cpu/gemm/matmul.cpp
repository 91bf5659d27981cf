// b is cut into chunks of columns and of K that stay in L2. Threads pack a chunk together, then each thread multiplies its
// rows of a with it, group by group. While the matrix unit multiplies one group, the vector units pack the next.
#include "cpu/gemm/matmul.h"

#include "cpu/arena.h"
#include "cpu/gemm/shape.h"
#include "cpu/matrix_form.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kChunk = 3 * 512 * 256;  // elements of a chunk of b in parts: a third of L2
constexpr int64_t kMostColumns = 512;      // of a chunk: a is packed once for each chunk of columns
constexpr int64_t kRows = 4 * kPartsRows;  // rows of a group
constexpr int64_t kWork = 64 * 64 * 64;    // multiply-adds of the smallest product that gains
// Multiply-adds for each element that is cut into parts, of the smallest product that gains: in fp32 MKL is faster below
// 72, in 16 bits nothing is gained below 24. (128 x 128 takes as long either way; in 16 bits an LSTM and a GRU of
// 100x1x64x64 are 1.4 and 1.5 times as fast, forward and backward.)
constexpr int64_t kWorkPerElement = 72, kWorkPerShortElement = 24;

struct Sizes {
  Parts parts;
  int64_t columns, depth;          // of a chunk of b
  int64_t b_elements, a_elements;  // of a chunk, and of a group of rows, in parts
  int64_t sums;                    // that wait for all of K before they are converted
};

// Rows [k, k + depth) of b, of the columns from `column` on that `shape` counts.
struct Chunk {
  int64_t k, depth, column;
  Shape shape;
};

Sizes sizes_of(const MatmulParams& p) {
  const Parts parts = parts_of(p.dtype, /*rounded_rows=*/true);
  const int64_t columns = p.N <= kMostColumns / 2 ? kMostColumns / 2 : kMostColumns, depth = kChunk / parts.panels / columns;
  const int64_t blocks = depth_blocks(depth);
  return {parts,
          columns,
          depth,
          blocks * (columns / kPartsColumns) * parts.panels * kPartsTile,
          blocks * (kRows / kPartsRows) * parts.rows * kPartsTile,
          p.out_dtype != DType::kFloat32 && p.K > depth ? p.M * columns : 0};
}

class Matmul {
 public:
  Matmul(const MatmulParams& p, const Kernels<float>& kernels, int threads, const Allocate& allocate)
      : p_(p),
        kernels_(*kernels.parts),
        save_(p.out_dtype == DType::kFloat32 ? nullptr : kernels.save[storage_index(p.out_dtype)]),
        sizes_(sizes_of(p)),
        storage_(storage_index(p.dtype)),
        element_(dtype_size(p.dtype)),
        threads_(threads) {
    layout(allocate(layout(nullptr)));
    barrier_.reset(threads);
  }
  void run(int thread);
  bool finite() const { return !infinite_.load(); }

 private:
  int64_t layout(void* base);
  void pack_b(int thread, const Chunk& chunk);
  // A group of rows of a, of the chunk's k; `next` quarters of its tiles are packed by now.
  struct RowGroup {
    uint16_t* to;
    int64_t row, count, k, depth;
    int64_t next = 0;
    int64_t blocks() const { return (count + kPartsRows - 1) / kPartsRows; }
    int64_t quarters() const { return 4 * blocks() * depth_blocks(depth); }
  };
  // The packing of a group, some of it at each round of another group's products.
  struct Packing {
    Matmul& matmul;
    RowGroup& group;
    int64_t rounds;  // of those products
    int64_t done = 0;
  };
  void pack_a(RowGroup& group, int64_t quarters);
  void multiply_group(const RowGroup& group, RowGroup& next, const Chunk& chunk);
  // `count` rows of a from `row` on, packed at `rows`.
  struct Rows {
    const uint16_t* packed;
    int64_t row;
    int count;
  };
  void multiply_block(const Rows& rows, const Chunk& chunk, int64_t panel, const Background& background);

  const MatmulParams& p_;
  const PartsKernels& kernels_;
  void (*const save_)(const float* from, void* to, int64_t n);  // to the type of out, or null
  const Sizes sizes_;
  const int storage_;
  const int64_t element_;
  const int threads_;
  uint16_t *b_, *a_;  // of a two groups a thread
  float* sums_;       // [M, sizes_.columns]
  Barrier barrier_;
  std::atomic<bool> infinite_{false};
};

int64_t Matmul::layout(void* base) {
  Arena arena(base);
  b_ = arena.take<uint16_t>(sizes_.b_elements);
  a_ = arena.take<uint16_t>(2 * sizes_.a_elements * threads_);
  sums_ = arena.take<float>(sizes_.sums);
  return arena.used();
}

const void* at(const void* base, int64_t index, int64_t size) { return static_cast<const char*>(base) + index * size; }

// Asks for `count` rows of `columns` elements: rows of a wide matrix are pages apart, which no hardware foresees.
void prefetch_rows(const void* first, int64_t stride, int64_t count, int64_t columns, int64_t element) {
  for (int64_t r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(at(first, r * stride, element));
    for (int64_t i = 0; i < columns * element; i += 64) __builtin_prefetch(row + i, 0, 2);
  }
}

// Packs the thread's share of the vectors of a chunk, 32 rows at a time.
void Matmul::pack_b(int thread, const Chunk& chunk) {
  const auto& [k, depth, column, shape] = chunk;
  const int64_t vectors = shape.columns() / kPartsColumns, tile = sizes_.parts.panels * kPartsTile;
  const int64_t first = share_begin(vectors, threads_, thread), last = share_begin(vectors, threads_, thread + 1);
  for (int64_t begin = 0; begin < depth; begin += kPartsDepth) {
    const void* rows = at(p_.b, (k + begin) * p_.b_stride + column, element_);
    const int64_t next = std::min<int64_t>(depth - begin - kPartsDepth, kPartsDepth);
    for (int64_t v = first; v < last; ++v) {
      const int64_t panel = v / shape.vectors, place = v % shape.vectors, panel_vectors = shape.vectors_of(panel);
      uint16_t* to = b_ + (panel * shape.vectors * depth_blocks(depth) + begin / kPartsDepth * panel_vectors + place) * tile;
      const int lanes = static_cast<int>(std::min<int64_t>(shape.units - v * kPartsColumns, kPartsColumns));
      prefetch_rows(at(rows, kPartsDepth * p_.b_stride + v * kPartsColumns, element_), p_.b_stride, next, lanes, element_);
      const PartsSource source{at(rows, v * kPartsColumns, element_), p_.b_stride, lanes,
                               std::min<int64_t>(kPartsDepth, depth - begin)};
      if (!kernels_.pack_straight[storage_](source, sizes_.parts.panels, to, panel_vectors * tile)) infinite_.store(true);
    }
  }
}

// Packs the group up to so many quarters of tiles. A transposed a is taken 32 k deep for all blocks, so that a line of
// memory is used whole.
void Matmul::pack_a(RowGroup& group, int64_t quarters) {
  const auto pack = (p_.a_transposed ? kernels_.pack_columns : kernels_.pack_block)[storage_];
  const int64_t tile_elements = sizes_.parts.rows * kPartsTile, deep = depth_blocks(group.depth), blocks = group.blocks();
  for (; group.next < quarters; ++group.next) {
    const int64_t tile = group.next / 4, quarter = group.next % 4;
    const int64_t block = p_.a_transposed ? tile % blocks : tile / deep;
    const int64_t begin = (p_.a_transposed ? tile / blocks : tile % deep) * kPartsDepth;
    const int64_t row = group.row + block * kPartsRows, k = group.k + begin;
    const int64_t depth = std::min<int64_t>(kPartsDepth, group.depth - begin);
    const int lanes = static_cast<int>(std::min<int64_t>(group.count - block * kPartsRows, kPartsRows));
    if (p_.a_transposed) {
      const int64_t next = begin + kPartsDepth + 8 * quarter;
      prefetch_rows(at(p_.a, (group.k + next) * p_.a_stride + row, element_), p_.a_stride,
                    std::min<int64_t>(group.depth - next, 8), lanes, element_);
    }
    const int64_t first = p_.a_transposed ? k * p_.a_stride + row : row * p_.a_stride + k;
    uint16_t* to = group.to + (block * deep + begin / kPartsDepth) * tile_elements;
    const PartsSource source{at(p_.a, first, element_), p_.a_stride, lanes, depth};
    if (!pack(source, sizes_.parts.rows, to, static_cast<int>(quarter))) infinite_.store(true);
  }
}

// The product of a block of rows, or two, with a panel of the chunk: into `out` directly, or by way of sums that are
// converted, cut to the columns that exist, or added.
void Matmul::multiply_block(const Rows& rows, const Chunk& chunk, int64_t panel, const Background& background) {
  const auto& [packed, row, count] = rows;
  const auto& [k, depth, column, shape] = chunk;
  alignas(64) float tile[2 * kPartsRows * kMaxTileVectors * kPartsColumns];
  const int vectors = shape.vectors_of(panel);
  const int64_t start = shape.columns_before(panel), columns = int64_t{vectors} * kPartsColumns;
  const int64_t exist = std::min(columns, shape.units - start);
  const uint16_t* b = b_ + panel * shape.vectors * depth_blocks(depth) * sizes_.parts.panels * kPartsTile;
  const int64_t first_out = row * p_.out_stride + column + start;
  float *sums = tile, *out = static_cast<float*>(p_.out) + first_out;
  int64_t stride = columns;
  if (sizes_.sums) {
    sums = sums_ + row * sizes_.columns + start, stride = sizes_.columns;
  } else if (!save_ && exist == columns) {
    sums = out, stride = p_.out_stride;
  }
  const bool add = k > 0 && sums != tile;
  kernels_.gemm({depth, sizes_.parts, packed, count, vectors, b, nullptr, add, sums, stride, {}, background});
  if (save_) {
    if (k + depth < p_.K) return;
    char* to = static_cast<char*>(p_.out) + first_out * dtype_size(p_.out_dtype);
    for (int r = 0; r < count; ++r) save_(sums + r * stride, to + r * p_.out_stride * dtype_size(p_.out_dtype), exist);
  } else if (sums == tile) {
    for (int r = 0; r < count; ++r) {
      for (int64_t c = 0; c < exist; ++c) {
        out[r * p_.out_stride + c] = tile[r * columns + c] + (k > 0 ? out[r * p_.out_stride + c] : 0.0f);
      }
    }
  }
}

void Matmul::multiply_group(const RowGroup& group, RowGroup& next, const Chunk& chunk) {
  const Shape& shape = chunk.shape;
  const int64_t deep = depth_blocks(group.depth), vectors = shape.columns() / shape.width;
  Packing packing{*this, next, deep * vectors * group.blocks() / 4};
  const Background background{[](void* context, int64_t, int64_t) {
                                Packing& p = *static_cast<Packing*>(context);
                                const int64_t quarters = p.group.quarters();
                                p.matmul.pack_a(p.group, std::min(quarters, quarters * ++p.done / p.rounds));
                              },
                              &packing};
  for (int64_t panel = 0; panel < shape.panels; ++panel) {
    const int pair = shape.vectors_of(panel) % 2 == 0 ? 2 : 1;
    for (int64_t r = 0; r < group.count;) {
      const int64_t rows =
          group.count - r >= pair * kPartsRows ? pair * kPartsRows : std::min<int64_t>(kPartsRows, group.count - r);
      const uint16_t* packed = group.to + r / kPartsRows * deep * sizes_.parts.rows * kPartsTile;
      multiply_block({packed, group.row + r, static_cast<int>(rows)}, chunk, panel,
                     next.count > 0 ? background : Background{});
      r += rows;
    }
  }
  pack_a(next, next.quarters());
}

void Matmul::run(int thread) {
  uint16_t* const a[] = {a_ + 2 * thread * sizes_.a_elements, a_ + (2 * thread + 1) * sizes_.a_elements};
  const int64_t row_blocks = (p_.M + kPartsRows - 1) / kPartsRows;
  const int64_t first = share_begin(row_blocks, threads_, thread) * kPartsRows;
  const int64_t last = std::min(share_begin(row_blocks, threads_, thread + 1) * kPartsRows, p_.M);
  for (int64_t column = 0; column < p_.N; column += sizes_.columns) {
    for (int64_t k = 0; k < p_.K; k += sizes_.depth) {
      const int64_t depth = std::min(sizes_.depth, p_.K - k);
      const Chunk chunk{k, depth, column, Shape(depth, std::min(sizes_.columns, p_.N - column), 1, kPartsColumns)};
      pack_b(thread, chunk);
      barrier_.wait();
      const auto group_at = [&](int64_t row, int which) {
        return RowGroup{a[which], row, std::clamp<int64_t>(last - row, 0, kRows), k, depth};
      };
      int which = 0;
      RowGroup group = group_at(first, which);
      pack_a(group, group.quarters());
      while (group.count > 0) {
        which = 1 - which;
        RowGroup next = group_at(group.row + kRows, which);
        multiply_group(group, next, chunk);
        group = next;
      }
      barrier_.wait();
    }
  }
  kernels_.release();
}

}  // namespace

bool matmul_available(DType dtype, int64_t M, int64_t N, int64_t K) {
  return dtype != DType::kFloat64 && gains_from_parts(selected_kernels().f32, storage_index(dtype)) && M > 0 && N > 0 &&
         K >= kPartsDepth && M * N * K >= kWork &&
         M * N >= (dtype == DType::kFloat32 ? kWorkPerElement : kWorkPerShortElement) * (M + N);
}

bool matmul(const MatmulParams& p, const Allocate& allocate) {
  const auto with_threads = [&](int threads, bool& finite) {
    Matmul work(p, selected_kernels().f32, threads, allocate);
    const bool complete = run_threads(threads, [&](int thread) { work.run(thread); });
    finite = work.finite();
    return complete;
  };
  bool finite = false;
  if (!with_threads(thread_limit(), finite)) with_threads(1, finite);
  return finite;
}

}  // namespace fused_rnn::cpu
