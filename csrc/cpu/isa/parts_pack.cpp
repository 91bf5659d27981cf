// The packing of parts.h with AVX-512. Only functions of this file may be compiled between the pragmas, for the reason that
// kernels_avx512.cpp gives.
#include <type_traits>

#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both: GCC 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace fused_rnn::cpu::parts_pack {
namespace {

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
  bool has_parts() const { return _mm512_cmpge_epu32_mask(bits_, _mm512_set1_epi32(0x7f7f8000)) == 0; }

 private:
  __m512i bits_;
};

inline int lanes_left(int64_t size, int64_t at) {
  const int64_t left = size - at;
  return left > 16 ? 16 : left < 0 ? 0 : static_cast<int>(left);
}

template <class Storage>
uint32_t pack_rows(const void* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out) {
  Largest largest[kPartsRows];
  for (int64_t k = 0; k < depth; k += kPartsDepth, out += parts * kPartsTile) {
    const int low = lanes_left(depth, k), high = lanes_left(depth, k + 16);
    for (int r = 0; r < n_rows; ++r) {
      const Storage* const row = static_cast<const Storage*>(rows[r]) + k;
      __m512 a = load16(row, low), b = high > 0 ? load16(row + 16, high) : _mm512_setzero_ps();
      largest[r].see(a);
      largest[r].see(b);
      for (int part = 0; part < parts; ++part) {
        const bool rest = part + 1 < (parts > kAllParts<Storage> ? parts : kAllParts<Storage>);
        const __m512i x = take_part(a, rest), y = take_part(b, rest);
        _mm512_storeu_si512(out + part * kPartsTile + r * kPartsDepth, in_order(x, y));
      }
    }
  }
  uint32_t infinite = 0;
  for (int r = 0; r < n_rows; ++r) infinite |= static_cast<uint32_t>(!largest[r].has_parts()) << r;
  return infinite;
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

// A panel's vector whose columns are rows of the source.
template <class Storage>
bool pack_transposed(const PartsSource& source, int parts, uint16_t* out, int64_t stride) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  for (int64_t k = 0; k < source.depth; k += kPartsDepth, out += stride) {
    const int low = lanes_left(source.depth, k), high = lanes_left(source.depth, k + 16);
    __m512 a[16], b[16];
    for (int lane = 0; lane < 16; ++lane) {
      const Storage* row = from + lane * source.stride + k;
      a[lane] = lane < source.lanes ? load16(row, low) : _mm512_setzero_ps();
      b[lane] = lane < source.lanes && high > 0 ? load16(row + 16, high) : _mm512_setzero_ps();
      largest.see(a[lane]);
      largest.see(b[lane]);
    }
    for (int part = 0; part < parts; ++part) {
      const bool rest = part + 1 < kAllParts<Storage>;
      __m512i rows[16];
      for (int lane = 0; lane < 16; ++lane) {
        const __m512i x = take_part(a[lane], rest), y = take_part(b[lane], rest);
        rows[lane] = in_order(x, y);
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + part * kPartsTile + i * 32, rows[i]);
    }
  }
  return largest.has_parts();
}

// A panel's vector whose columns are columns of the source.
template <class Storage>
bool pack_straight(const PartsSource& source, int parts, uint16_t* out, int64_t stride) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  for (int64_t k = 0; k < source.depth; k += kPartsDepth, out += stride) {
    for (int pair = 0; pair < 16; ++pair) {
      const int64_t at = k + 2 * pair;
      __m512 even = at < source.depth ? load16(from + at * source.stride, source.lanes) : _mm512_setzero_ps();
      __m512 odd = at + 1 < source.depth ? load16(from + (at + 1) * source.stride, source.lanes) : _mm512_setzero_ps();
      largest.see(even);
      largest.see(odd);
      for (int part = 0; part < parts; ++part) {
        const bool rest = part + 1 < kAllParts<Storage>;
        const __m512i x = take_part(even, rest), y = take_part(odd, rest);
        _mm512_storeu_si512(out + part * kPartsTile + pair * 32, in_pairs(x, y));
      }
    }
  }
  return largest.has_parts();
}

// Four rows of a row tile.
template <class Storage>
bool pack_block(const PartsSource& source, int parts, uint16_t* tile, int quarter) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  const int low = lanes_left(source.depth, 0), high = lanes_left(source.depth, 16);
  for (int lane = 4 * quarter; lane < 4 * quarter + 4; ++lane) {
    const Storage* row = from + lane * source.stride;
    __m512 a = lane < source.lanes ? load16(row, low) : _mm512_setzero_ps();
    __m512 b = lane < source.lanes && high > 0 ? load16(row + 16, high) : _mm512_setzero_ps();
    largest.see(a);
    largest.see(b);
    for (int part = 0; part < parts; ++part) {
      const bool rest = part + 1 < kAllParts<Storage>;
      const __m512i x = take_part(a, rest), y = take_part(b, rest);
      _mm512_storeu_si512(tile + part * kPartsTile + lane * kPartsDepth, in_order(x, y));
    }
  }
  return largest.has_parts();
}

// Eight k of a row tile whose rows are columns of the source.
template <class Storage>
bool pack_columns(const PartsSource& source, int parts, uint16_t* tile, int quarter) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  __m512 even[4], odd[4];
  for (int pair = 0; pair < 4; ++pair) {
    const int64_t at = 8 * quarter + 2 * pair;
    even[pair] = at < source.depth ? load16(from + at * source.stride, source.lanes) : _mm512_setzero_ps();
    odd[pair] = at + 1 < source.depth ? load16(from + (at + 1) * source.stride, source.lanes) : _mm512_setzero_ps();
    largest.see(even[pair]);
    largest.see(odd[pair]);
  }
  for (int part = 0; part < parts; ++part) {
    const bool rest = part + 1 < kAllParts<Storage>;
    __m512i t[4], u[4];
    for (int pair = 0; pair < 4; ++pair) {
      const __m512i x = take_part(even[pair], rest), y = take_part(odd[pair], rest);
      t[pair] = in_pairs(x, y);
    }
    for (int half = 0; half < 2; ++half) {
      const __m512i low = half ? _mm512_unpackhi_epi32(t[0], t[1]) : _mm512_unpacklo_epi32(t[0], t[1]);
      const __m512i high = half ? _mm512_unpackhi_epi32(t[2], t[3]) : _mm512_unpacklo_epi32(t[2], t[3]);
      u[2 * half] = _mm512_unpacklo_epi64(low, high);
      u[2 * half + 1] = _mm512_unpackhi_epi64(low, high);
    }
    // u[c] has in its 128-bit lane l the four pairs of column 4 l + c.
    uint16_t* to = tile + part * kPartsTile + 8 * quarter;
    for (int c = 0; c < 4; ++c) {
      const auto store = [&](int lane, __m128i pairs) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (4 * lane + c) * kPartsDepth), pairs);
      };
      store(0, _mm512_castsi512_si128(u[c]));
      store(1, _mm512_extracti32x4_epi32(u[c], 1));
      store(2, _mm512_extracti32x4_epi32(u[c], 2));
      store(3, _mm512_extracti32x4_epi32(u[c], 3));
    }
  }
  return largest.has_parts();
}

}  // namespace
}  // namespace fused_rnn::cpu::parts_pack
#pragma GCC pop_options

namespace fused_rnn::cpu {
namespace {

template <class Storage>
void add_storage(PartsKernels& kernels, int storage) {
  kernels.pack_rows[storage] = parts_pack::pack_rows<Storage>;
  kernels.pack_transposed[storage] = parts_pack::pack_transposed<Storage>;
  kernels.pack_straight[storage] = parts_pack::pack_straight<Storage>;
  kernels.pack_block[storage] = parts_pack::pack_block<Storage>;
  kernels.pack_columns[storage] = parts_pack::pack_columns<Storage>;
}

}  // namespace

PartsKernels parts_packing() {
  PartsKernels kernels;
  add_storage<float>(kernels, 0);
  add_storage<Half>(kernels, 1);
  add_storage<BFloat16>(kernels, 2);
  return kernels;
}
}  // namespace fused_rnn::cpu
#endif
