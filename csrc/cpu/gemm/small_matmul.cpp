// Products so small that calling a library, or waking threads, takes longer than the work. The vector kernels' tile makes
// them on the calling thread.
#include <algorithm>

#include "cpu/gemm/matmul.h"
#include "cpu/gemm/product.h"

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

// Where the arrays of the workspace lie; with a null base only its size is known.
template <class A>
struct Room {
  A *rows, *last_columns, *tile;
  int64_t bytes;

  Room(const MatmulParams& p, int width, void* base) {
    Arena arena(base);
    rows = arena.take<A>(transposes(p) ? p.M * p.K : 0);
    last_columns = arena.take<A>(p.N % width ? p.K * width : 0);
    tile = arena.take<A>(kTileBytes / static_cast<int64_t>(sizeof(A)));
    bytes = arena.used();
  }
  static bool transposes(const MatmulParams& p) { return p.a_transposed && p.K > 1; }
};

template <class A>
void multiply_small(const MatmulParams& p, bool add, const Kernels<A>& kernels, void* workspace) {
  const int64_t width = kernels.width, whole = p.N / width * width;
  const bool transposes = Room<A>::transposes(p);
  const Room<A> room(p, kernels.width, workspace);
  A *const rows = room.rows, *const last_columns = room.last_columns, *const tile = room.tile;
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
                    2 * width,
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

template <class A>
void multiply(const MatmulParams& p, bool add, const Allocate& allocate) {
  const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
  multiply_small(p, add, kernels, allocate(Room<A>(p, kernels.width, nullptr).bytes));
}

// Products of 16-bit matrices: in float, rounded once.
void multiply_converted(const MatmulParams& p, bool add, const Allocate& allocate) {
  const Kernels<float>& kernels = selected_kernels().f32;
  const int storage = storage_index(p.dtype);
  const int64_t a_rows = p.a_transposed ? p.K : p.M, a_columns = p.a_transposed ? p.M : p.K;
  MatmulParams q = p;
  q.dtype = q.out_dtype = DType::kFloat32;
  q.a_stride = a_columns;
  q.b_stride = q.out_stride = p.N;
  const int64_t inner = Room<float>(q, kernels.width, nullptr).bytes;
  float *a = nullptr, *b = nullptr, *out = nullptr, *row = nullptr;
  char* workspace = nullptr;
  const auto layout = [&](void* base) {
    Arena arena(base);
    workspace = arena.take<char>(inner);
    a = arena.take<float>(a_rows * a_columns);
    b = arena.take<float>(p.K * p.N);
    out = arena.take<float>(p.M * p.N);
    row = arena.take<float>(p.N);
    return arena.used();
  };
  layout(allocate(layout(nullptr)));
  const auto stored = [](const void* from, int64_t index) { return stored_at(from, index, 2); };
  for (int64_t i = 0; i < a_rows; ++i) kernels.load[storage](stored(p.a, i * p.a_stride), a + i * a_columns, a_columns);
  for (int64_t i = 0; i < p.K; ++i) kernels.load[storage](stored(p.b, i * p.b_stride), b + i * p.N, p.N);
  q.a = a, q.b = b, q.out = out;
  multiply_small(q, /*add=*/false, kernels, workspace);
  for (int64_t i = 0; i < p.M; ++i) {
    void* to = stored_at(p.out, i * p.out_stride, 2);
    if (add) {
      kernels.load[storage](to, row, p.N);
      for (int64_t n = 0; n < p.N; ++n) out[i * p.N + n] += row[n];
    }
    kernels.save[storage](out + i * p.N, to, p.N);
  }
}

}  // namespace

bool small_matmul_available(DType dtype, int64_t M, int64_t N, int64_t K) {
  if (M == 0 || N == 0 || K == 0) return false;
  const InstructionSet& kernels = selected_kernels();
  return M * N * K <= kWorkPerLane * (dtype == DType::kFloat64 ? kernels.f64.width : kernels.f32.width);
}

void small_matmul(const MatmulParams& p, bool add, const Allocate& allocate) {
  switch (p.dtype) {
    case DType::kFloat64: return multiply<double>(p, add, allocate);
    case DType::kFloat32: return multiply<float>(p, add, allocate);
    case DType::kFloat16:
    case DType::kBFloat16: return multiply_converted(p, add, allocate);
  }
}

}  // namespace fused_rnn::cpu
