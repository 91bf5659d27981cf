// Rows become columns: how panels are packed. To be included inside the target region, if there is one.
#pragma once
#include <type_traits>

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

// Square::transpose(from, stride, to, step) takes Square::kSide elements each way.
template <class V, class Square, class A>
inline void transpose_squares(const TransposeCall<A>& call) {
  constexpr int kSide = Square::kSide;
  const int64_t lanes = call.lanes - call.lanes % kSide, depth = call.depth - call.depth % kSide;
  for (int64_t lane = 0; lane < lanes; lane += kSide) {
    const A* const from = call.from + lane * call.stride;
    for (int64_t k = 0; k < depth; k += kSide)
      Square::transpose(from + k, call.stride, call.to + k * call.step + lane, call.step);
  }
  transpose_elements<V>(call, 0, lanes, depth);
  transpose_elements<V>(call, lanes, call.lanes, 0);
}

#ifdef __SSE2__
template <class V>
struct SquareOfFour {
  static constexpr int kSide = 4;
  static void transpose(const float* from, int64_t stride, float* to, int64_t step) {
    __m128 rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = _mm_loadu_ps(from + i * stride);
    _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * step, rows[i]);
  }
};
#endif

template <class V>
[[gnu::flatten]] void transpose(const TransposeCall<typename V::Scalar>& call) {
  if constexpr (!std::is_void_v<typename V::Square>) {
    transpose_squares<V, typename V::Square>(call);
#ifdef __SSE2__
  } else if constexpr (sizeof(typename V::Scalar) == sizeof(float)) {
    transpose_squares<V, SquareOfFour<V>>(call);
#endif
  } else {
    transpose_elements<V>(call, 0, call.lanes, 0);
  }
}

}  // namespace fused_rnn::cpu
