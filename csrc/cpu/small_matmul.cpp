// Products of a size at which calling a library, or waking threads, takes longer than the work: by the vector kernels' tile, on the
// calling thread.
#include <algorithm>

#include "matmul.h"
#include "matrix.h"
#include "scan.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kWorkPerLane = 8 * 1024;  // multiply-adds at most, for each lane of a vector

// a [K, M] as [M, K].
template <class A>
void transpose(const MatmulParams& p, A* to) {
  const A* from = static_cast<const A*>(p.a);
  constexpr int64_t kBlock = 16;
  for (int64_t m0 = 0; m0 < p.M; m0 += kBlock) {
    for (int64_t k = 0; k < p.K; ++k) {
      for (int64_t m = m0; m < std::min(m0 + kBlock, p.M); ++m) to[m * p.K + k] = from[k * p.a_stride + m];
    }
  }
}

template <class A>
void multiply_small(const MatmulParams& p, bool add, const Allocate& allocate) {
  const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
  const int64_t width = kernels.width, whole = p.N / width * width;
  const bool transposes = p.a_transposed && p.K > 1;
  A *rows = nullptr, *last_columns = nullptr, *tile = nullptr;
  const auto layout = [&](void* base) {
    Arena arena(base);
    rows = arena.take<A>(transposes ? p.M * p.K : 0);
    last_columns = arena.take<A>(whole < p.N ? p.K * width : 0);
    tile = arena.take<A>(kTileBytes / static_cast<int64_t>(sizeof(A)));
    return arena.used();
  };
  layout(allocate(layout(nullptr)));
  const A* b = static_cast<const A*>(p.b);
  if (transposes) transpose(p, rows);
  for (int64_t k = 0; whole < p.N && k < p.K; ++k) {
    std::fill_n(last_columns + k * width, width, A(0));
    std::copy_n(b + k * p.b_stride + whole, p.N - whole, last_columns + k * width);
  }
  const A* a = transposes ? rows : static_cast<const A*>(p.a);
  const int64_t row_stride = transposes ? p.K : p.a_transposed ? 1 : p.a_stride;
  for (int64_t column = 0; column < p.N;) {
    const bool last = column == whole;
    const int64_t vectors = last ? 1 : std::min<int64_t>((whole - column) / width, kMaxTileVectors);
    const int64_t columns = last ? p.N - whole : vectors * width;
    for_row_blocks(p.M, kernels.max_rows[vectors], [&](int64_t begin, int count) {
      const A* pointers[kMaxTileRows];
      for (int r = 0; r < count; ++r) pointers[r] = a + (begin + r) * row_stride;
      A* out = static_cast<A*>(p.out) + begin * p.out_stride + column;
      const bool direct = !add && !last;
      kernels.gemm({p.K,
                    pointers,
                    count,
                    1,
                    static_cast<int>(vectors),
                    last ? last_columns : b + column,
                    last ? width : p.b_stride,
                    0,
                    nullptr,
                    direct ? out : tile,
                    direct ? p.out_stride : vectors * width,
                    {}});
      for (int r = 0; r < count && !direct; ++r) {
        A* to = out + r * p.out_stride;
        const A* sums = tile + r * vectors * width;
        for (int64_t c = 0; c < columns; ++c) to[c] = add ? to[c] + sums[c] : sums[c];
      }
    });
    column += columns;
  }
}

}  // namespace

bool small_matmul_available(DType dtype, int64_t M, int64_t N, int64_t K) {
  if (M == 0 || N == 0 || K == 0) return false;
  if (dtype == DType::kFloat32) return M * N * K <= kWorkPerLane * selected_kernels().f32.width;
  return dtype == DType::kFloat64 && M * N * K <= kWorkPerLane * selected_kernels().f64.width;
}

void small_matmul(const MatmulParams& p, bool add, const Allocate& allocate) {
  with_arithmetic(p.dtype, [&](auto a) {
    multiply_small<decltype(a)>(p, add, allocate);
    return 0;
  });
}

}  // namespace fused_rnn::cpu
