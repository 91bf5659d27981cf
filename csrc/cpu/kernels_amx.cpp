// The kernels of split.h on Intel's AMX. As in kernels_avx512.cpp nothing but functions of this file may be compiled between
// the pragmas.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace fused_rnn::cpu::amx {
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

// A part is the upper half of a float, rounded, and the rest is exact. Returned in place, its lower half zero; the values keep the rest.
inline __m512i take_part(__m512& values) {
  const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
  const __m512i part = _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  values = _mm512_sub_ps(values, _mm512_castsi512_ps(part));
  return part;
}
// Parts of 32 values in order, and of 16 pairs.
inline __m512i in_order(__m512i low, __m512i high) {
  const __m512i upper_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                                25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(low, upper_halves, high);
}
inline __m512i in_pairs(__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd); }

// The largest magnitude that was seen, as bits. NaN, infinities and what rounds to one have no parts.
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

uint32_t pack_rows(const float* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out) {
  Largest largest[kSplitRows];
  for (int64_t k = 0; k < depth; k += kSplitDepth, out += parts * kSplitTile) {
    const int low = lanes_left(depth, k), high = lanes_left(depth, k + 16);
    for (int r = 0; r < n_rows; ++r) {
      __m512 a = load16(rows[r] + k, low), b = high > 0 ? load16(rows[r] + k + 16, high) : _mm512_setzero_ps();
      largest[r].see(a);
      largest[r].see(b);
      for (int part = 0; part < parts; ++part) {
        const __m512i x = take_part(a), y = take_part(b);
        _mm512_storeu_si512(out + part * kSplitTile + r * kSplitDepth, in_order(x, y));
      }
    }
  }
  uint32_t infinite = 0;
  for (int r = 0; r < n_rows; ++r) infinite |= static_cast<uint32_t>(!largest[r].has_parts()) << r;
  return infinite;
}

// rows[i] lane j <-> rows[j] lane i.
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

// A panel's vector (kPanel), or a block of rows: the same numbers, a panel tile is a row tile with pairs of k transposed.
template <class Storage, bool kPanel>
bool pack_rows_of(const SplitSource& source, int parts, uint16_t* out, int64_t stride) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  for (int64_t k = 0; k < source.depth; k += kSplitDepth, out += stride) {
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
      __m512i rows[16];
      for (int lane = 0; lane < 16; ++lane) {
        const __m512i x = take_part(a[lane]), y = take_part(b[lane]);
        rows[lane] = in_order(x, y);
      }
      if constexpr (kPanel) transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + part * kSplitTile + i * 32, rows[i]);
    }
  }
  return largest.has_parts();
}

template <class Storage, bool kPanel>
bool pack_columns_of(const SplitSource& source, int parts, uint16_t* out, int64_t stride) {
  const Storage* from = static_cast<const Storage*>(source.from);
  Largest largest;
  for (int64_t k = 0; k < source.depth; k += kSplitDepth, out += stride) {
    __m512 even[16], odd[16];
    for (int pair = 0; pair < 16; ++pair) {
      const int64_t at = k + 2 * pair;
      even[pair] = at < source.depth ? load16(from + at * source.stride, source.lanes) : _mm512_setzero_ps();
      odd[pair] = at + 1 < source.depth ? load16(from + (at + 1) * source.stride, source.lanes) : _mm512_setzero_ps();
      largest.see(even[pair]);
      largest.see(odd[pair]);
    }
    for (int part = 0; part < parts; ++part) {
      __m512i rows[16];
      for (int pair = 0; pair < 16; ++pair) {
        const __m512i x = take_part(even[pair]), y = take_part(odd[pair]);
        rows[pair] = in_pairs(x, y);
      }
      if constexpr (!kPanel) transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + part * kSplitTile + i * 32, rows[i]);
    }
  }
  return largest.has_parts();
}

// ---- the product ----

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
thread_local int configured_rows = 0;

// Tiles 0 to 3: sums, 4 to 6: parts of the rows, 7: a panel tile.
void configure(int n_rows) {
  if (n_rows == configured_rows) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == 7 ? kSplitRows : n_rows);
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 takes the intrinsic to read 8 bytes only
  _tile_loadconfig(&config);
  configured_rows = n_rows;
}
void release() {
  _tile_release();
  configured_rows = 0;
}

// Tile numbers are part of the instruction: hence macros.
#define FUSED_RNN_START(v)                                     \
  if constexpr (kVectors > v) {                                \
    if (start) {                                               \
      _tile_loadd(v, start + v * kSplitColumns, start_stride); \
    } else {                                                   \
      _tile_zero(v);                                           \
    }                                                          \
  }
#define FUSED_RNN_PANEL(v, j) _tile_loadd(7, panel + ((v) * kPanelParts + (j)) * kSplitTile, 64)
#define FUSED_RNN_MULTIPLY(v)                                        \
  if constexpr (kVectors > v) {                                      \
    if constexpr (kPanelParts > 2) {                                 \
      FUSED_RNN_PANEL(v, 2);                                         \
      _tile_dpbf16ps(v, 4, 7);                                       \
    }                                                                \
    if constexpr (kPanelParts > 1) {                                 \
      FUSED_RNN_PANEL(v, 1);                                         \
      _tile_dpbf16ps(v, 4, 7);                                       \
      if constexpr (kRowParts > 2) _tile_dpbf16ps(v, 5, 7);          \
    }                                                                \
    FUSED_RNN_PANEL(v, 0);                                           \
    if constexpr (kRowParts > 2) _tile_dpbf16ps(v, 5, 7);            \
    _tile_dpbf16ps(v, 4, 7);                                         \
    if constexpr (kRowParts == 2) _tile_dpbf16ps(v, 5, 7);           \
    if constexpr (kRowParts > 2) _tile_dpbf16ps(v, 6, 7);            \
    for (; next < stop; next += 64) _mm_prefetch(next, _MM_HINT_T1); \
    stop += quarter;                                                 \
  }
#define FUSED_RNN_STORE(v) \
  if constexpr (kVectors > v) _tile_stored(v, call.out + v * kSplitColumns, out_stride)

template <int kVectors, int kRowParts, int kPanelParts>
void product(const SplitCall& call) {
  const uint16_t *rows = call.rows, *panel = call.panel;
  const int64_t out_stride = call.out_stride * static_cast<int64_t>(sizeof(float));
  // A stride of 0 gives every row the same initial values.
  const float* start = call.add ? call.out : call.init;
  const int64_t start_stride = call.add ? out_stride : 0;
  configure(call.n_rows);
  asm volatile("" : : : "memory");  // the intrinsics do not say that they read memory
  FUSED_RNN_START(0);
  FUSED_RNN_START(1);
  FUSED_RNN_START(2);
  FUSED_RNN_START(3);
  const int64_t quarter = call.prefetch.step / kVectors;
  const char *next = call.prefetch.from, *stop = next + quarter;
  const int64_t blocks = split_blocks(call.depth);
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, rows, 64);
    if constexpr (kRowParts > 1) _tile_loadd(5, rows + kSplitTile, 64);
    if constexpr (kRowParts > 2) _tile_loadd(6, rows + 2 * kSplitTile, 64);
    rows += kRowParts * kSplitTile;
    FUSED_RNN_MULTIPLY(0);
    FUSED_RNN_MULTIPLY(1);
    FUSED_RNN_MULTIPLY(2);
    FUSED_RNN_MULTIPLY(3);
    panel += kVectors * kPanelParts * kSplitTile;
    if (call.background.run) call.background.run(call.background.context, block, blocks);
  }
  FUSED_RNN_STORE(0);
  FUSED_RNN_STORE(1);
  FUSED_RNN_STORE(2);
  FUSED_RNN_STORE(3);
}

#undef FUSED_RNN_START
#undef FUSED_RNN_MULTIPLY
#undef FUSED_RNN_PANEL
#undef FUSED_RNN_STORE

// 32 rows, two vectors at a time, pairs of parts in the same order as above: sums in tiles 0 to 3 take turns, and each tile that is read serves two products.
#define FUSED_RNN_ROWS(i)                      \
  _tile_loadd(4, rows + (i) * kSplitTile, 64); \
  _tile_loadd(5, more_rows + (i) * kSplitTile, 64)
#define FUSED_RNN_PANEL(j)                      \
  _tile_loadd(6, panel + (j) * kSplitTile, 64); \
  _tile_loadd(7, panel + (kPanelParts + (j)) * kSplitTile, 64)
#define FUSED_RNN_FOUR     \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)

template <int kRowParts, int kPanelParts>
void product_of_two(const SplitCall& call, int vector) {
  const int64_t blocks = split_blocks(call.depth), out_stride = call.out_stride * static_cast<int64_t>(sizeof(float));
  const uint16_t *rows = call.rows, *more_rows = rows + blocks * kRowParts * kSplitTile;
  const uint16_t* panel = call.panel + vector * kPanelParts * kSplitTile;
  float *out = call.out + vector * kSplitColumns, *more_out = out + kSplitRows * call.out_stride;
  if (call.add || call.init) {
    const float* start = call.add ? out : call.init + vector * kSplitColumns;
    const float* more_start = call.add ? more_out : start;
    const int64_t stride = call.add ? out_stride : 0;
    _tile_loadd(0, start, stride);
    _tile_loadd(1, start + kSplitColumns, stride);
    _tile_loadd(2, more_start, stride);
    _tile_loadd(3, more_start + kSplitColumns, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const Prefetch& prefetch = call.prefetch;
  const char* next = prefetch.from + vector * (prefetch.step * blocks / call.vectors);
  const int64_t fetch = prefetch.step * 2 / call.vectors;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < fetch; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
    next += fetch;
    FUSED_RNN_ROWS(0);
    if constexpr (kPanelParts > 2) {
      FUSED_RNN_PANEL(2);
      FUSED_RNN_FOUR;
    }
    if constexpr (kPanelParts > 1) {
      FUSED_RNN_PANEL(1);
      FUSED_RNN_FOUR;
      if constexpr (kRowParts > 2) {
        FUSED_RNN_ROWS(1);
        FUSED_RNN_FOUR;
      }
    }
    FUSED_RNN_PANEL(0);
    FUSED_RNN_FOUR;
    if constexpr (kRowParts > 2) {
      FUSED_RNN_ROWS(0);
      FUSED_RNN_FOUR;
    }
    if constexpr (kRowParts > 1) {
      FUSED_RNN_ROWS(kRowParts - 1);
      FUSED_RNN_FOUR;
    }
    rows += kRowParts * kSplitTile;
    more_rows += kRowParts * kSplitTile;
    panel += call.vectors * kPanelParts * kSplitTile;
    if (call.background.run) {
      const int64_t rounds = blocks * call.vectors / 2;
      call.background.run(call.background.context, blocks * vector / 2 + block, rounds);
    }
  }
  _tile_stored(0, out, out_stride);
  _tile_stored(1, out + kSplitColumns, out_stride);
  _tile_stored(2, more_out, out_stride);
  _tile_stored(3, more_out + kSplitColumns, out_stride);
}
#undef FUSED_RNN_ROWS
#undef FUSED_RNN_PANEL
#undef FUSED_RNN_FOUR

template <int kRowParts, int kPanelParts>
void product_of_vectors(const SplitCall& call) {
  if (call.n_rows > kSplitRows) {
    configure(kSplitRows);
    asm volatile("" : : : "memory");
    for (int vector = 0; vector < call.vectors; vector += 2) product_of_two<kRowParts, kPanelParts>(call, vector);
    return;
  }
  switch (call.vectors) {
    case 1: return product<1, kRowParts, kPanelParts>(call);
    case 2: return product<2, kRowParts, kPanelParts>(call);
    case 3: return product<3, kRowParts, kPanelParts>(call);
    default: return product<4, kRowParts, kPanelParts>(call);
  }
}

void gemm(const SplitCall& call) {
  if (call.parts.rows == 3) return product_of_vectors<3, 3>(call);
  if (call.parts.panels == 2) return product_of_vectors<2, 2>(call);
  if (call.parts.rows == 2) return product_of_vectors<2, 1>(call);
  return product_of_vectors<1, 1>(call);
}

}  // namespace
}  // namespace fused_rnn::cpu::amx
#pragma GCC pop_options

namespace fused_rnn::cpu {
namespace {

// The processor has it, and the kernel lets this process use its registers (arch/x86/include/uapi/asm/prctl.h).
bool amx_available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!avx512_kernels() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tile = edx >> 24 & 1, bf16_tile = edx >> 22 & 1;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  const bool bf16_vector = eax >> 5 & 1;
  return tile && bf16_tile && bf16_vector && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const InstructionSet* amx_kernels() {
  static const SplitKernels split{
      amx::pack_rows,
      {amx::pack_rows_of<float, true>, amx::pack_rows_of<Half, true>, amx::pack_rows_of<BFloat16, true>},
      {amx::pack_columns_of<float, true>, amx::pack_columns_of<Half, true>, amx::pack_columns_of<BFloat16, true>},
      {amx::pack_rows_of<float, false>, amx::pack_rows_of<Half, false>, amx::pack_rows_of<BFloat16, false>},
      {amx::pack_columns_of<float, false>, amx::pack_columns_of<Half, false>, amx::pack_columns_of<BFloat16, false>},
      amx::gemm,
      amx::release};
  static const bool available = amx_available();
  if (!available) return nullptr;
  static const Kernels<float> f32 = [] {
    Kernels<float> table = avx512_kernels()->f32;
    table.split = &split;
    return table;
  }();
  static const InstructionSet set{"amx", f32, avx512_kernels()->f64};
  return &set;
}
}  // namespace fused_rnn::cpu
#else
namespace fused_rnn::cpu {
const InstructionSet* amx_kernels() { return nullptr; }
}  // namespace fused_rnn::cpu
#endif
