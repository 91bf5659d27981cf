// SIMD vectors of AVX2 with FMA and F16C. To be included inside a target region.
#pragma once
#include "cpu/isa/simd_math.h"

namespace fused_rnn::cpu::avx2 {

#define FUSED_RNN_INLINE [[gnu::always_inline]] inline

#include "cpu/isa/squares_avx2.h"

// The state of the hash in content_hash.h: that of AVX-512, in two halves.
struct VectorHash {
  static constexpr int kStripe = 64;
  __m256i mixed[2];

  FUSED_RNN_INLINE VectorHash(const HashKeys& keys, uint64_t before) {
    for (int half = 0; half < 2; ++half)
      mixed[half] = _mm256_xor_si256(_mm256_set1_epi64x(static_cast<int64_t>(before)), load(keys.mix + 4 * half));
  }
  FUSED_RNN_INLINE void add(const HashKeys& keys, const char* from, int64_t stripes) {
    __m256i products[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, words[2] = {products[0], products[0]};
#pragma GCC unroll 2
    for (int64_t s = 0; s < stripes; ++s) {
      for (int half = 0; half < 2; ++half) {
        const __m256i word = load(from + s * kStripe + half * 32);
        const __m256i keyed = _mm256_add_epi32(word, load(keys.words + s * (kStripe / 8) + half * 4));
        products[half] = _mm256_add_epi64(products[half], _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32)));
        words[half] = _mm256_add_epi64(words[half], word);
      }
    }
    for (int half = 0; half < 2; ++half) {
      mix(mixed[half], products[half], keys.mix[8] | 1);
      mix(mixed[half], words[half], keys.mix[9] | 1);
    }
  }
  FUSED_RNN_INLINE uint64_t result(const HashKeys& keys) const {
    uint64_t lanes[8], hash = keys.mix[10];
    for (int half = 0; half < 2; ++half) _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 4 * half), mixed[half]);
    for (uint64_t lane : lanes) {
      hash = (hash ^ lane) * (keys.mix[11] | 1);
      hash ^= hash >> 32;
    }
    return hash;
  }

 private:
  FUSED_RNN_INLINE static __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  // The low half of a product of 64 bits, then a rotation.
  FUSED_RNN_INLINE static void mix(__m256i& mixed, __m256i sums, uint64_t odd) {
    const __m256i a = _mm256_xor_si256(mixed, sums), b = _mm256_set1_epi64x(static_cast<int64_t>(odd));
    const __m256i cross =
        _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b), _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
    const __m256i product = _mm256_add_epi64(_mm256_mul_epu32(a, b), _mm256_slli_epi64(cross, 32));
    mixed = _mm256_or_si256(_mm256_slli_epi64(product, 29), _mm256_srli_epi64(product, 35));
  }
};

struct VecF : simd::VectorBase {
  using Scalar = float;
  using Hash = VectorHash;
  static constexpr int kWidth = 8;
  static constexpr int kMostSums = 12;  // of a tile in registers: they leave 4 of 16
  static constexpr bool kHalves = true;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 6, 4, 6};
  static constexpr int kMaxPanels[3] = {0, 2, 1};
  static constexpr int kDirectRows = 3;
  static constexpr int kInStep = 1;
  using Square = SquareF;
  static constexpr bool kShort = false;
  __m256 v;
  FUSED_RNN_INLINE VecF() {}
  FUSED_RNN_INLINE VecF(__m256 value) : v(value) {}
  FUSED_RNN_INLINE explicit VecF(float value) : v(_mm256_set1_ps(value)) {}
  FUSED_RNN_INLINE static VecF broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  FUSED_RNN_INLINE static VecF load(const float* p) { return _mm256_loadu_ps(p); }
  FUSED_RNN_INLINE static VecF load_pinned(const float* p) {
    __m256 value = _mm256_loadu_ps(p);
    asm("" : "+x"(value));
    return value;
  }
  FUSED_RNN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }

  FUSED_RNN_INLINE static VecF from_bits(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }
  FUSED_RNN_INLINE static VecF from_bits(__m128i bits, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  FUSED_RNN_INLINE __m128i to_bits(Half) const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  FUSED_RNN_INLINE __m128i to_bits(BFloat16) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  template <class Storage>
  FUSED_RNN_INLINE static VecF load(const Storage* p) {
    return from_bits(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Storage{});
  }
  template <class Storage>
  FUSED_RNN_INLINE void store(Storage* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bits(Storage{}));
  }
  template <class Storage>
  FUSED_RNN_INLINE static VecF load_partial(const Storage* p, int n) {
    Storage lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  template <class Storage>
  FUSED_RNN_INLINE void store_partial(Storage* p, int n) const {
    Storage lanes[kWidth];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  FUSED_RNN_INLINE friend VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
  FUSED_RNN_INLINE friend VecF multiply_add(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  FUSED_RNN_INLINE friend VecF clamp(VecF x, VecF low, VecF high) {
    return _mm256_min_ps(high.v, _mm256_max_ps(low.v, x.v));  // the second operand where one is NaN
  }
  FUSED_RNN_INLINE friend VecF round_to_integer(VecF x) { return _mm256_round_ps(x.v, 8); }
  FUSED_RNN_INLINE friend VecF power_of_two(VecF n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23));
  }
  FUSED_RNN_INLINE friend VecF select_less(VecF a, VecF b, VecF x, VecF y) {
    return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
  }
  FUSED_RNN_INLINE friend VecF reciprocal(VecF x) { return _mm256_div_ps(_mm256_set1_ps(1), x.v); }
  FUSED_RNN_INLINE friend VecF divide(VecF n, VecF d) { return _mm256_div_ps(n.v, d.v); }
  // Lane l of the result is the sum of the lanes of v[l], in the order of tile.h's sum_lanes: halves of each vector, halves
  // of those, and so on.
  FUSED_RNN_INLINE friend VecF sum_lanes(const VecF (&v)[8]) {
    __m256 halves[4];  // [l] has the four sums of v[l] and of v[l + 4]
    for (int l = 0; l < 4; ++l) {
      const __m256 low = _mm256_permute2f128_ps(v[l].v, v[l + 4].v, 0x20);
      halves[l] = _mm256_add_ps(low, _mm256_permute2f128_ps(v[l].v, v[l + 4].v, 0x31));
    }
    const __m256 a =
        _mm256_add_ps(_mm256_shuffle_ps(halves[0], halves[1], 0x44), _mm256_shuffle_ps(halves[0], halves[1], 0xee));
    const __m256 b =
        _mm256_add_ps(_mm256_shuffle_ps(halves[2], halves[3], 0x44), _mm256_shuffle_ps(halves[2], halves[3], 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
  }
};

struct VecD : simd::VectorBase {
  using Scalar = double;
  using Hash = VectorHash;
  static constexpr int kWidth = 4;
  static constexpr int kMostSums = 12;
  static constexpr bool kHalves = true;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 6, 4, 6};
  static constexpr int kMaxPanels[3] = {0, 2, 1};
  static constexpr int kDirectRows = 3;
  static constexpr int kInStep = 1;
  using Square = SquareD;
  static constexpr bool kShort = false;
  __m256d v;
  FUSED_RNN_INLINE VecD() {}
  FUSED_RNN_INLINE VecD(__m256d value) : v(value) {}
  FUSED_RNN_INLINE explicit VecD(double value) : v(_mm256_set1_pd(value)) {}
  FUSED_RNN_INLINE static VecD broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  FUSED_RNN_INLINE static VecD load(const double* p) { return _mm256_loadu_pd(p); }
  FUSED_RNN_INLINE static VecD load_pinned(const double* p) {
    __m256d value = _mm256_loadu_pd(p);
    asm("" : "+x"(value));
    return value;
  }
  FUSED_RNN_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FUSED_RNN_INLINE static VecD load_partial(const double* p, int n) {
    double lanes[kWidth] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  FUSED_RNN_INLINE void store_partial(double* p, int n) const {
    double lanes[kWidth];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }

  FUSED_RNN_INLINE friend VecD operator+(VecD a, VecD b) { return _mm256_add_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD operator-(VecD a, VecD b) { return _mm256_sub_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD operator*(VecD a, VecD b) { return _mm256_mul_pd(a.v, b.v); }
  FUSED_RNN_INLINE friend VecD multiply_add(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
  FUSED_RNN_INLINE friend VecD clamp(VecD x, VecD low, VecD high) {
    return _mm256_min_pd(high.v, _mm256_max_pd(low.v, x.v));
  }
  FUSED_RNN_INLINE friend VecD round_to_integer(VecD x) { return _mm256_round_pd(x.v, 8); }
  FUSED_RNN_INLINE friend VecD power_of_two(VecD n) {
    const __m256i exponent = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v));
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_add_epi64(exponent, _mm256_set1_epi64x(1023)), 52));
  }
  FUSED_RNN_INLINE friend VecD select_less(VecD a, VecD b, VecD x, VecD y) {
    return _mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ));
  }
  FUSED_RNN_INLINE friend VecD reciprocal(VecD x) { return _mm256_div_pd(_mm256_set1_pd(1), x.v); }
  FUSED_RNN_INLINE friend VecD divide(VecD n, VecD d) { return _mm256_div_pd(n.v, d.v); }
};

#undef FUSED_RNN_INLINE

}  // namespace fused_rnn::cpu::avx2
