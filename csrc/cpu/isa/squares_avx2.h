// Squares that transpose.h takes at a time, in AVX2. To be included inside a target region and a namespace.
//
// Elements of a row of the upper half join those of the lower half as they are loaded: that takes no shuffle.
#pragma once

struct SquareF {
  static constexpr int kSide = 8;
  [[gnu::always_inline]] static inline void transpose(const float* from, int64_t stride, float* to, int64_t step) {
    __m256 rows[8], pairs[8];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        const float* const row = from + i * stride + 4 * half;
        rows[4 * half + i] =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * stride), 1);
      }
    }
    for (int i = 0; i < 4; ++i) {
      pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
      pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {
      const __m256* const p = pairs + 4 * half;
      float* const out = to + 4 * half * step;
      _mm256_storeu_ps(out, _mm256_shuffle_ps(p[0], p[2], 0x44));
      _mm256_storeu_ps(out + step, _mm256_shuffle_ps(p[0], p[2], 0xee));
      _mm256_storeu_ps(out + 2 * step, _mm256_shuffle_ps(p[1], p[3], 0x44));
      _mm256_storeu_ps(out + 3 * step, _mm256_shuffle_ps(p[1], p[3], 0xee));
    }
  }
};

struct SquareD {
  static constexpr int kSide = 4;
  [[gnu::always_inline]] static inline void transpose(const double* from, int64_t stride, double* to, int64_t step) {
    for (int half = 0; half < 4; half += 2) {
      __m256d rows[2];
      for (int i = 0; i < 2; ++i) {
        const double* const row = from + i * stride + half;
        rows[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(row)), _mm_loadu_pd(row + 2 * stride), 1);
      }
      _mm256_storeu_pd(to + half * step, _mm256_unpacklo_pd(rows[0], rows[1]));
      _mm256_storeu_pd(to + (half + 1) * step, _mm256_unpackhi_pd(rows[0], rows[1]));
    }
  }
};
