// K is cut into chunks, so that a chunk of b stays in L2: threads pack it together, then each multiplies its rows of a, block by
// block.
#include "matmul.h"

#include "matrix.h"
#include "threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kDepth = 512;            // K of a chunk
constexpr int64_t kColumns = 256;          // columns of b packed at a time
constexpr int64_t kRows = 4 * kSplitRows;  // rows of a packed at a time
constexpr int64_t kWork = 64 * 64 * 64;    // a product of fewer multiply-adds is not worth it
// Multiply-adds for each element that is cut into parts: of fewer than this, MKL is done sooner (where they meet: 128 x 128).
constexpr int64_t kWorkPerElement = 72;

struct Sizes {
  SplitParts parts;
  int64_t b_elements, a_elements;
};

Sizes sizes_of(DType dtype) {
  const SplitParts parts = split_parts(storage_index(dtype), /*rounded_rows=*/true);
  const int64_t blocks = split_blocks(kDepth);
  return {parts, blocks * (kColumns / kSplitColumns) * parts.panels * kSplitTile,
          blocks * (kRows / kSplitRows) * parts.rows * kSplitTile};
}

int64_t layout(void* base, const Sizes& sizes, int threads, uint16_t** b, uint16_t** a) {
  Arena arena(base);
  *b = arena.take<uint16_t>(sizes.b_elements);
  *a = arena.take<uint16_t>(sizes.a_elements * threads);
  return arena.used();
}

class Matmul {
 public:
  Matmul(const MatmulParams& p, const SplitKernels& kernels, int threads, const Allocate& allocate)
      : p_(p),
        kernels_(kernels),
        sizes_(sizes_of(p.dtype)),
        storage_(storage_index(p.dtype)),
        element_(dtype_size(p.dtype)),
        threads_(threads) {
    layout(allocate(layout(nullptr, sizes_, threads, &b_, &a_)), sizes_, threads, &b_, &a_);
    barrier_.reset(threads);
  }
  void run(int thread);
  bool finite() const { return !infinite_.load(); }

 private:
  void pack_b(int thread, int64_t k, int64_t depth, const Shape& shape, int64_t column);
  void pack_a(uint16_t* to, int64_t row, int64_t count, int64_t k, int64_t depth);
  void multiply_block(const uint16_t* a, int64_t row, int count, int64_t k, int64_t depth, const Shape& shape,
                      int64_t column, int64_t panel);

  const MatmulParams& p_;
  const SplitKernels& kernels_;
  const Sizes sizes_;
  const int storage_;
  const int64_t element_;
  const int threads_;
  uint16_t *b_, *a_;
  Barrier barrier_;
  std::atomic<bool> infinite_{false};
};

const void* at(const void* base, int64_t index, int64_t size) { return static_cast<const char*>(base) + index * size; }

// The thread's share of the vectors of b[k, column] on.
void Matmul::pack_b(int thread, int64_t k, int64_t depth, const Shape& shape, int64_t column) {
  const int64_t vectors = shape.columns() / kSplitColumns, tile = sizes_.parts.panels * kSplitTile;
  for (int64_t v = share_begin(vectors, threads_, thread); v < share_begin(vectors, threads_, thread + 1); ++v) {
    const int64_t panel = v / shape.vectors, place = v % shape.vectors;
    const int64_t panel_vectors = shape.vectors_of(panel);
    uint16_t* to = b_ + (panel * shape.vectors * split_blocks(depth) + place) * tile;
    const int lanes = static_cast<int>(std::min<int64_t>(shape.units - v * kSplitColumns, kSplitColumns));
    const SplitSource source{at(p_.b, k * p_.b_stride + column + v * kSplitColumns, element_), p_.b_stride, lanes, depth};
    if (!kernels_.pack_straight[storage_](source, sizes_.parts.panels, to, panel_vectors * tile)) infinite_.store(true);
  }
}

// `count` rows as blocks of 16. Columns are taken 32 deep and of all blocks at a time, so that whole lines of memory are used at once.
void Matmul::pack_a(uint16_t* to, int64_t row, int64_t count, int64_t k, int64_t depth) {
  const auto pack = (p_.a_transposed ? kernels_.pack_columns : kernels_.pack_block)[storage_];
  const int64_t tile = sizes_.parts.rows * kSplitTile, step = p_.a_transposed ? kSplitDepth : depth;
  for (int64_t begin = 0; begin < depth; begin += step) {
    for (int64_t r = 0; r < count; r += kSplitRows) {
      const int64_t first = p_.a_transposed ? (k + begin) * p_.a_stride + row + r : (row + r) * p_.a_stride + k;
      const SplitSource source{at(p_.a, first, element_), p_.a_stride,
                               static_cast<int>(std::min<int64_t>(count - r, kSplitRows)), std::min(step, depth - begin)};
      uint16_t* block = to + (r / kSplitRows * split_blocks(depth) + begin / kSplitDepth) * tile;
      if (!pack(source, sizes_.parts.rows, block, tile)) infinite_.store(true);
    }
  }
}

void Matmul::multiply_block(const uint16_t* a, int64_t row, int count, int64_t k, int64_t depth, const Shape& shape,
                            int64_t column, int64_t panel) {
  const bool add = k > 0;
  alignas(64) float tile[2 * kSplitRows * kMaxTileVectors * kSplitColumns];
  const int vectors = shape.vectors_of(panel);
  const int64_t start = shape.columns_before(panel), columns = int64_t{vectors} * kSplitColumns;
  const int64_t exist = std::min(columns, shape.units - start);
  const uint16_t* b = b_ + panel * shape.vectors * split_blocks(depth) * sizes_.parts.panels * kSplitTile;
  float* out = p_.out + row * p_.out_stride + column + start;
  const bool whole = exist == columns;
  kernels_.gemm({depth,
                 sizes_.parts,
                 a,
                 count,
                 vectors,
                 b,
                 nullptr,
                 whole && add,
                 whole ? out : tile,
                 whole ? p_.out_stride : columns,
                 {}});
  for (int r = 0; !whole && r < count; ++r) {
    for (int64_t c = 0; c < exist; ++c) {
      out[r * p_.out_stride + c] = tile[r * columns + c] + (add ? out[r * p_.out_stride + c] : 0.0f);
    }
  }
}

void Matmul::run(int thread) {
  uint16_t* a = a_ + thread * sizes_.a_elements;
  const int64_t row_blocks = (p_.M + kSplitRows - 1) / kSplitRows;
  const int64_t first = share_begin(row_blocks, threads_, thread) * kSplitRows;
  const int64_t last = std::min(share_begin(row_blocks, threads_, thread + 1) * kSplitRows, p_.M);
  for (int64_t column = 0; column < p_.N; column += kColumns) {
    for (int64_t k = 0; k < p_.K; k += kDepth) {
      const int64_t depth = std::min(kDepth, p_.K - k);
      const Shape shape(depth, std::min(kColumns, p_.N - column), 1, kSplitColumns);
      pack_b(thread, k, depth, shape, column);
      barrier_.wait();
      const int64_t block = split_blocks(depth) * sizes_.parts.rows * kSplitTile;
      for (int64_t row = first; row < last; row += kRows) {
        const int64_t count = std::min(kRows, last - row);
        pack_a(a, row, count, k, depth);
        for (int64_t panel = 0; panel < shape.panels; ++panel) {
          const int pair = shape.vectors_of(panel) % 2 == 0 ? 2 : 1;
          for (int64_t r = 0; r < count;) {
            const int64_t rows =
                count - r >= pair * kSplitRows ? pair * kSplitRows : std::min<int64_t>(kSplitRows, count - r);
            multiply_block(a + r / kSplitRows * block, row + r, static_cast<int>(rows), k, depth, shape, column, panel);
            r += rows;
          }
        }
      }
      barrier_.wait();
    }
  }
  kernels_.release();
}

const SplitKernels* split_kernels() { return selected_kernels().f32.split; }

}  // namespace

bool matmul_available(DType dtype, int64_t M, int64_t N, int64_t K) {
  return dtype != DType::kFloat64 && split_kernels() && M > 0 && N > 0 && K >= kSplitDepth && M * N * K >= kWork &&
         M * N >= kWorkPerElement * (M + N);
}

bool matmul(const MatmulParams& p, const Allocate& allocate) {
  const auto with_threads = [&](int threads, bool& finite) {
    Matmul work(p, *split_kernels(), threads, allocate);
    const bool complete = run_threads(threads, [&](int thread) { work.run(thread); });
    finite = work.finite();
    return complete;
  };
  bool finite = false;
  if (!with_threads(thread_limit(), finite)) with_threads(1, finite);
  return finite;
}

}  // namespace fused_rnn::cpu
