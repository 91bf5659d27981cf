#include "matrix.h"

namespace fused_rnn::cpu {
namespace {

template <class A, class Storage>
void pack_transposed_from(const Shape& s, const Storage* from, int64_t first, int64_t last, A* to) {
  for (int64_t p = first; p < last; ++p) {
    const int vectors = s.vectors_of(p);
    const int64_t first_vector = s.columns_before(p) / s.width;
    const int64_t step = int64_t{vectors} * s.width;
    A* panel = to + s.columns_before(p) * s.depth;
    for (int v = 0; v < vectors; ++v) {
      const int64_t unit = (first_vector + v) / s.gates * s.width;
      const int64_t gate = (first_vector + v) % s.gates;
      const int lanes = static_cast<int>(std::min<int64_t>(s.width, s.units - unit));
      const Storage* rows = from + (gate * s.units + unit) * s.depth;
      // Blocks of a cache line of k keep both sides in L1.
      for (int64_t k0 = 0; k0 < s.depth; k0 += 16) {
        const int64_t k1 = std::min(k0 + 16, s.depth);
        for (int lane = 0; lane < lanes; ++lane) {
          for (int64_t k = k0; k < k1; ++k) panel[k * step + v * s.width + lane] = to_arithmetic(rows[lane * s.depth + k]);
        }
        for (int lane = lanes; lane < s.width; ++lane) {
          for (int64_t k = k0; k < k1; ++k) panel[k * step + v * s.width + lane] = 0;
        }
      }
    }
  }
}

template <class A, class Storage>
void pack_straight_from(const Shape& s, const Storage* from, int64_t first, int64_t last, A* to) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t step = int64_t{s.vectors_of(p)} * s.width;
    const int64_t start = s.columns_before(p);
    const int64_t columns = std::min(step, s.units - start);
    A* panel = to + start * s.depth;
    for (int64_t k = 0; k < s.depth; ++k) {
      const Storage* row = from + k * s.units + start;
      for (int64_t i = 0; i < columns; ++i) panel[k * step + i] = to_arithmetic(row[i]);
      for (int64_t i = columns; i < step; ++i) panel[k * step + i] = 0;
    }
  }
}

// Calls f with the pointer in its storage type, one of those that A is the arithmetic type of.
template <class A, class F>
void with_storage(DType dtype, const void* from, F&& f) {
  if constexpr (sizeof(A) == 8) {
    (void)dtype;
    f(static_cast<const double*>(from));
  } else {
    switch (storage_index(dtype)) {
      case 1: return f(static_cast<const Half*>(from));
      case 2: return f(static_cast<const BFloat16*>(from));
      default: return f(static_cast<const float*>(from));
    }
  }
}

}  // namespace

template <class A>
void pack_transposed(const Shape& shape, DType dtype, const void* from, int64_t first, int64_t last, A* to) {
  with_storage<A>(dtype, from, [&](auto* typed) { pack_transposed_from(shape, typed, first, last, to); });
}
template <class A>
void pack_straight(const Shape& shape, DType dtype, const void* from, int64_t first, int64_t last, A* to) {
  with_storage<A>(dtype, from, [&](auto* typed) { pack_straight_from(shape, typed, first, last, to); });
}

template void pack_transposed(const Shape&, DType, const void*, int64_t, int64_t, float*);
template void pack_transposed(const Shape&, DType, const void*, int64_t, int64_t, double*);
template void pack_straight(const Shape&, DType, const void*, int64_t, int64_t, float*);
template void pack_straight(const Shape&, DType, const void*, int64_t, int64_t, double*);

}  // namespace fused_rnn::cpu
