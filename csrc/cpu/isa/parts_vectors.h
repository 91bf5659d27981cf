// Values as bfloat16 parts (parts.h), in vectors of AVX-512. To be included inside a target region and an unnamed namespace.
#pragma once

// 16 values as float, lanes past n zero.
inline __m512 load16(const float* p, int n) {
  return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
inline __m256i load16_bits(const void* p, int n) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u), p);
}
inline __m512 load16(const Half* p, int n) { return _mm512_cvtph_ps(load16_bits(p, n)); }
inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m512 load16(const BFloat16* p, int n) { return widen(load16_bits(p, n)); }

// Parts that hold every bit of a stored value.
template <class Storage>
constexpr int kAllParts = sizeof(Storage) == 4            ? 3
                          : std::is_same_v<Storage, Half> ? 2
                                                          : 1;

// Returns the values' next part, the rounded upper half of each float, in place; the values become the rest, which is exact.
// The last part leaves no rest: it is the values themselves, whose lower halves are zero, or are dropped near the smallest
// numbers.
inline __m512i take_part(__m512& values, bool leaves_rest) {
  if (!leaves_rest) return _mm512_castps_si512(values);
  const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
  const __m512i part = _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  values = _mm512_sub_ps(values, _mm512_castsi512_ps(part));
  return part;
}
// The upper halves of 32 values: one after the other, or as 16 pairs of an even and an odd value.
inline __m512i in_order(__m512i low, __m512i high) {
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                                25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(low, upper_halves, high);
}
inline __m512i in_pairs(__m512i even, __m512i odd) {
  constexpr int kEvenOrUpperOdd = 0xf8;  // a | (b & c)
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, upper, kEvenOrUpperOdd);
}

// The largest magnitude that was seen, as bits. NaN, infinities and values that round to an infinity have no parts.
class Largest {
 public:
  Largest() : bits_(_mm512_setzero_si512()) {}
  void see(__m512 values) {
    bits_ = _mm512_max_epu32(bits_, _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fffffff)));
  }
  bool has_parts() const {
    return _mm512_cmpge_epu32_mask(bits_, _mm512_set1_epi32(static_cast<int>(kLeastWithoutParts))) == 0;
  }

 private:
  __m512i bits_;
};

inline int lanes_left(int64_t size, int64_t at) {
  const int64_t left = size - at;
  return left > 16 ? 16 : left < 0 ? 0 : static_cast<int>(left);
}

// Cuts the 32 values of a tile's row into parts, each of which goes to its tile.
template <class Storage>
inline void store_parts(__m512 low, __m512 high, int parts, uint16_t* row, Largest& largest) {
  largest.see(low);
  largest.see(high);
  for (int part = 0; part < parts; ++part) {
    const bool rest = part + 1 < (parts > kAllParts<Storage> ? parts : kAllParts<Storage>);
    const __m512i a = take_part(low, rest), b = take_part(high, rest);
    _mm512_storeu_si512(row + part * kPartsTile, in_order(a, b));
  }
}

// Swaps lane j of rows[i] with lane i of rows[j].
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      u[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + 2 + half]);
      u[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + 2 + half]);
    }
  }
  // u[4 q + c] has in its 128-bit lane l the elements 4 l + c of rows 4 q to 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x88), e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
}
