// Rows become columns: how panels are packed. To be included inside the target region, if there is one.
#pragma once
#include "cpu/isa/kernels.h"
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace fused_rnn::cpu {

template <class V, class A>
inline void transpose_elements(const TransposeCall<A>& call, int64_t first_lane, int64_t last_lane, int64_t first_k) {
  for (int64_t lane = first_lane; lane < last_lane; ++lane) {
    for (int64_t k = first_k; k < call.depth; ++k) call.to[k * call.step + lane] = call.from[lane * call.stride + k];
  }
}

// Squares of kSide elements: square(from, stride, to, step) transposes one.
template <class V, int kSide, class A, class Square>
inline void transpose_squares(const TransposeCall<A>& call, const Square& square) {
  const int64_t lanes = call.lanes - call.lanes % kSide, depth = call.depth - call.depth % kSide;
  for (int64_t lane = 0; lane < lanes; lane += kSide) {
    const A* const from = call.from + lane * call.stride;
    for (int64_t k = 0; k < depth; k += kSide) square(from + k, call.stride, call.to + k * call.step + lane, call.step);
  }
  transpose_elements<V>(call, 0, lanes, depth);
  transpose_elements<V>(call, lanes, call.lanes, 0);
}

#ifdef __SSE2__
template <class V>
inline void transpose_four(const float* from, int64_t stride, float* to, int64_t step) {
  __m128 rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + i * stride);
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * step, rows[i]);
}
#endif

template <class V>
[[gnu::flatten]] void transpose(const TransposeCall<typename V::Scalar>& call) {
  if constexpr (V::kSquare > 0) {
    transpose_squares<V, V::kSquare>(call, V::transpose_square);
#ifdef __SSE2__
  } else if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
    transpose_squares<V, 4>(call, transpose_four<V>);
#endif
  } else {
    transpose_elements<V>(call, 0, call.lanes, 0);
  }
}

}  // namespace fused_rnn::cpu
