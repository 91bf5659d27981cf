// SIMD vectors of AVX-512 (F, BW, DQ, VL) with F16C. To be included inside a target region.
#pragma once
#include "cpu/isa/simd_math.h"

namespace fused_rnn::cpu::avx512 {

#define FUSED_RNN_INLINE [[gnu::always_inline]] inline

#include "cpu/isa/squares_avx2.h"

// The state of the hash in content_hash.h: sums of products of 32 bits, and of words, each in eight lanes.
struct VectorHash {
  static constexpr int kStripe = 64;
  __m512i mixed;

  FUSED_RNN_INLINE VectorHash(const HashKeys& keys, uint64_t before) {
    mixed = _mm512_xor_si512(_mm512_set1_epi64(static_cast<int64_t>(before)), _mm512_loadu_si512(keys.mix));
  }
  FUSED_RNN_INLINE void add(const HashKeys& keys, const char* from, int64_t stripes) {
    __m512i products = _mm512_setzero_si512(), words = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t s = 0; s < stripes; ++s) {
      const __m512i word = _mm512_loadu_si512(from + s * kStripe);
      const __m512i keyed = _mm512_add_epi32(word, _mm512_loadu_si512(keys.words + s * (kStripe / 8)));
      products = _mm512_add_epi64(products, _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32)));
      words = _mm512_add_epi64(words, word);
    }
    mix(products, keys.mix[8] | 1);
    mix(words, keys.mix[9] | 1);
  }
  FUSED_RNN_INLINE uint64_t result(const HashKeys& keys) const {
    uint64_t lanes[8], hash = keys.mix[10];
    _mm512_storeu_si512(lanes, mixed);
    for (uint64_t lane : lanes) {
      hash = (hash ^ lane) * (keys.mix[11] | 1);
      hash ^= hash >> 32;
    }
    return hash;
  }

 private:
  FUSED_RNN_INLINE void mix(__m512i sums, uint64_t odd) {
    const __m512i product = _mm512_mullo_epi64(_mm512_xor_si512(mixed, sums), _mm512_set1_epi64(static_cast<int64_t>(odd)));
    mixed = _mm512_rol_epi64(product, 29);
  }
};

struct VecF : simd::VectorBase {
  using Scalar = float;
  using Hash = VectorHash;
  static constexpr int kWidth = 16;
  static constexpr int kMostSums = 24;
  static constexpr bool kHalves = false;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 8, 8, 6};
  static constexpr int kMaxPanels[3] = {0, 4, 2};
  static constexpr int kDirectRows = 4;
  static constexpr int kInStep = 4;
  using Square = SquareF;
  static constexpr bool kShort = true;  // has short_sigmoid and short_tanh
  __m512 v;
  FUSED_RNN_INLINE VecF() {}
  FUSED_RNN_INLINE VecF(__m512 value) : v(value) {}
  FUSED_RNN_INLINE explicit VecF(float value) : v(_mm512_set1_ps(value)) {}
  FUSED_RNN_INLINE static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  FUSED_RNN_INLINE static VecF broadcast(const float* p) { return _mm512_set1_ps(*p); }
  FUSED_RNN_INLINE static VecF load(const float* p) { return _mm512_loadu_ps(p); }
  // The value in a register: as an operand in memory it would be loaded again for each row of a tile.
  FUSED_RNN_INLINE static VecF load_pinned(const float* p) {
    __m512 value = _mm512_loadu_ps(p);
    asm("" : "+v"(value));
    return value;
  }
  FUSED_RNN_INLINE static VecF load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  FUSED_RNN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FUSED_RNN_INLINE void store_partial(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }

  FUSED_RNN_INLINE static VecF from_bits(__m256i bits, Half) { return _mm512_cvtph_ps(bits); }
  FUSED_RNN_INLINE static VecF from_bits(__m256i bits, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  FUSED_RNN_INLINE __m256i to_bits(Half) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  FUSED_RNN_INLINE __m256i to_bits(BFloat16) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  template <class Storage>
  FUSED_RNN_INLINE static VecF load(const Storage* p) {
    return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Storage{});
  }
  template <class Storage>
  FUSED_RNN_INLINE static VecF load_partial(const Storage* p, int n) {
    return from_bits(_mm256_maskz_loadu_epi16(mask(n), p), Storage{});
  }
  template <class Storage>
  FUSED_RNN_INLINE void store(Storage* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(Storage{}));
  }
  template <class Storage>
  FUSED_RNN_INLINE void store_partial(Storage* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n), to_bits(Storage{}));
  }

  FUSED_RNN_INLINE friend VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF multiply_add(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  FUSED_RNN_INLINE friend VecF clamp(VecF x, VecF low, VecF high) {
    return _mm512_min_ps(high.v, _mm512_max_ps(low.v, x.v));  // where x is NaN: the second operand, x
  }
  FUSED_RNN_INLINE friend VecF round_to_integer(VecF x) { return _mm512_roundscale_ps(x.v, 8); }
  FUSED_RNN_INLINE friend VecF power_of_two(VecF n) { return _mm512_scalef_ps(_mm512_set1_ps(1), n.v); }
  FUSED_RNN_INLINE friend VecF select_less(VecF a, VecF b, VecF x, VecF y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
  }
  // One Newton step on the 14-bit estimate.
  FUSED_RNN_INLINE friend VecF reciprocal(VecF x) {
    const __m512 r = _mm512_rcp14_ps(x.v);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(x.v, r, _mm512_set1_ps(1)), r, r);
  }
  // One Newton step on the quotient that the estimate gives.
  FUSED_RNN_INLINE friend VecF divide(VecF n, VecF d) {
    const __m512 r = _mm512_rcp14_ps(d.v);
    const __m512 q = _mm512_mul_ps(n.v, r);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, d.v, n.v), r, q);
  }
  // 1 / (1 + 2^t), t = -x log2(e). scalef rounds t down, and the fraction that is left goes through a polynomial; both were
  // fitted to the least relative error (2.6e-6 here, 1.5e-5 below).
  FUSED_RNN_INLINE friend VecF short_sigmoid(VecF x) {
    constexpr int kDown = 9;
    constexpr float kLimit = 87 * 1.44269504f;  // where simd::sigmoid cuts exp off
    const __m512 t =
        _mm512_min_ps(_mm512_set1_ps(kLimit), _mm512_mul_ps(x.v, _mm512_set1_ps(-1.44269504f)));  // NaN stays NaN
    const __m512 f = _mm512_reduce_ps(t, kDown);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0135341678f), f, _mm512_set1_ps(0.0520114638f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442755f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003833f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
    return reciprocal(VecF(_mm512_add_ps(_mm512_scalef_ps(p, t), _mm512_set1_ps(1))));
  }
  // e / (e + 2), e = 2^t - 1, t = 2 x log2(e) = n + f: e = 2^n (2^f - 1) + (2^n - 1), so that it is accurate near 0 too.
  FUSED_RNN_INLINE friend VecF short_tanh(VecF x) {
    constexpr int kNearest = 8;
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(126), _mm512_mul_ps(x.v, _mm512_set1_ps(2.88539008f)));
    const __m512 f = _mm512_reduce_ps(t, kNearest);
    const __m512 power = _mm512_scalef_ps(_mm512_set1_ps(1), _mm512_sub_ps(t, f));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.00961811095f), f, _mm512_set1_ps(0.0558372885f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240232527f));
    p = _mm512_mul_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693136871f)), f);
    const __m512 e = _mm512_fmadd_ps(power, p, _mm512_sub_ps(power, _mm512_set1_ps(1)));
    return _mm512_mul_ps(e, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(2))));
  }
  // Lane l of the result is the sum of the lanes of v[l]: pairs of rows are interleaved and added, four times.
  FUSED_RNN_INLINE friend VecF sum_lanes(const VecF (&v)[16]) {
    __m512 quads[4];
    for (int q = 0; q < 4; ++q) {
      const VecF* row = v + 4 * q;
      const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(row[0].v, row[1].v), _mm512_unpackhi_ps(row[0].v, row[1].v));
      const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(row[2].v, row[3].v), _mm512_unpackhi_ps(row[2].v, row[3].v));
      const __m512d a2 = _mm512_castps_pd(a), b2 = _mm512_castps_pd(b);
      quads[q] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a2, b2)), _mm512_castpd_ps(_mm512_unpackhi_pd(a2, b2)));
    }
    const __m512 low =
        _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    const __m512 high =
        _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
};

struct VecD : simd::VectorBase {
  using Scalar = double;
  using Hash = VectorHash;
  static constexpr int kWidth = 8;
  static constexpr int kMostSums = 24;
  static constexpr bool kHalves = false;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 8, 8, 6};
  static constexpr int kMaxPanels[3] = {0, 4, 2};
  static constexpr int kDirectRows = 4;
  static constexpr int kInStep = 4;
  using Square = SquareD;
  static constexpr bool kShort = false;
  __m512d v;
  FUSED_RNN_INLINE VecD() {}
  FUSED_RNN_INLINE VecD(__m512d value) : v(value) {}
  FUSED_RNN_INLINE explicit VecD(double value) : v(_mm512_set1_pd(value)) {}
  FUSED_RNN_INLINE static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
  FUSED_RNN_INLINE static VecD broadcast(const double* p) { return _mm512_set1_pd(*p); }
  FUSED_RNN_INLINE static VecD load(const double* p) { return _mm512_loadu_pd(p); }
  FUSED_RNN_INLINE static VecD load_pinned(const double* p) {
    __m512d value = _mm512_loadu_pd(p);
    asm("" : "+v"(value));
    return value;
  }
  FUSED_RNN_INLINE static VecD load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  FUSED_RNN_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FUSED_RNN_INLINE void store_partial(double* p, int n) const { _mm512_mask_storeu_pd(p, mask(n), v); }

  FUSED_RNN_INLINE friend VecD operator+(VecD a, VecD b) { return _mm512_add_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD operator-(VecD a, VecD b) { return _mm512_sub_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD operator*(VecD a, VecD b) { return _mm512_mul_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD multiply_add(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
  FUSED_RNN_INLINE friend VecD clamp(VecD x, VecD low, VecD high) {
    return _mm512_min_pd(high.v, _mm512_max_pd(low.v, x.v));
  }
  FUSED_RNN_INLINE friend VecD round_to_integer(VecD x) { return _mm512_roundscale_pd(x.v, 8); }
  FUSED_RNN_INLINE friend VecD power_of_two(VecD n) { return _mm512_scalef_pd(_mm512_set1_pd(1), n.v); }
  FUSED_RNN_INLINE friend VecD select_less(VecD a, VecD b, VecD x, VecD y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
  }
  FUSED_RNN_INLINE friend VecD reciprocal(VecD x) { return _mm512_div_pd(_mm512_set1_pd(1), x.v); }
  FUSED_RNN_INLINE friend VecD divide(VecD n, VecD d) { return _mm512_div_pd(n.v, d.v); }
};

#undef FUSED_RNN_INLINE

}  // namespace fused_rnn::cpu::avx512
