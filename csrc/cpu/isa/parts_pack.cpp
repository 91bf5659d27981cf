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

#include "cpu/isa/parts_vectors.h"

template <class Storage>
uint32_t pack_rows(const void* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out) {
  Largest largest[kPartsRows];
  for (int64_t k = 0; k < depth; k += kPartsDepth, out += parts * kPartsTile) {
    const int low = lanes_left(depth, k), high = lanes_left(depth, k + 16);
    for (int r = 0; r < n_rows; ++r) {
      const Storage* const row = static_cast<const Storage*>(rows[r]) + k;
      store_parts<Storage>(load16(row, low), high > 0 ? load16(row + 16, high) : _mm512_setzero_ps(), parts,
                           out + r * kPartsDepth, largest[r]);
    }
  }
  uint32_t infinite = 0;
  for (int r = 0; r < n_rows; ++r) infinite |= static_cast<uint32_t>(!largest[r].has_parts()) << r;
  return infinite;
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
    store_parts<Storage>(a, b, parts, tile + lane * kPartsDepth, largest);
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
