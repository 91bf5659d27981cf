// The product of parts.h on Intel's AMX. Only functions of this file may be compiled between the pragmas, for the reason
// that kernels_avx512.cpp gives.
#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // both: GCC 12 in its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-bf16")

namespace fused_rnn::cpu::amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
thread_local int configured_rows = 0;

#include "cpu/isa/parts_vectors.h"

// Tiles 0 to 3: sums, 4 to 6: parts of the rows, 7: a panel tile.
void configure(int n_rows) {
  if (n_rows == configured_rows) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile == 7 ? kPartsRows : n_rows);
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that the intrinsic reads 8 bytes only
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
      _tile_loadd(v, start + v * kPartsColumns, start_stride); \
    } else {                                                   \
      _tile_zero(v);                                           \
    }                                                          \
  }
#define FUSED_RNN_PANEL(v, j) _tile_loadd(7, panel + ((v) * kPanelParts + (j)) * kPartsTile, 64)
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
  if constexpr (kVectors > v) _tile_stored(v, call.out + v * kPartsColumns, out_stride)

template <int kVectors, int kRowParts, int kPanelParts>
void product(const PartsCall& call) {
  const uint16_t *rows = call.rows, *panel = call.panel;
  const int64_t out_stride = call.out_stride * static_cast<int64_t>(sizeof(float));
  // With a stride of 0 every row starts from the same values.
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
  const int64_t blocks = depth_blocks(call.depth);
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, rows, 64);
    if constexpr (kRowParts > 1) _tile_loadd(5, rows + kPartsTile, 64);
    if constexpr (kRowParts > 2) _tile_loadd(6, rows + 2 * kPartsTile, 64);
    rows += kRowParts * kPartsTile;
    FUSED_RNN_MULTIPLY(0);
    FUSED_RNN_MULTIPLY(1);
    FUSED_RNN_MULTIPLY(2);
    FUSED_RNN_MULTIPLY(3);
    panel += kVectors * kPanelParts * kPartsTile;
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

// 32 rows, two vectors at a time, with pairs of parts in the same order as above. Sums in tiles 0 to 3 take turns, and each
// tile that is read serves two products.
#define FUSED_RNN_ROWS(i)                      \
  _tile_loadd(4, rows + (i) * kPartsTile, 64); \
  _tile_loadd(5, more_rows + (i) * kPartsTile, 64)
#define FUSED_RNN_PANEL(j)                      \
  _tile_loadd(6, panel + (j) * kPartsTile, 64); \
  _tile_loadd(7, panel + (kPanelParts + (j)) * kPartsTile, 64)
// Each product asks for its share of the lines to be prefetched. Many requests in a row would fill the queue of lines on
// their way, and loads of tiles would wait for it: an LSTM's inference in fp32 takes 0.84 to 0.92 of the time that it takes
// with all lines of a block at once (128x64x256, 256x32x512, 32x64x1024; Sapphire Rapids, 2026-11-22).
#define FUSED_RNN_ONE(sum, row, panel)                             \
  _tile_dpbf16ps(sum, row, panel);                                 \
  for (; next < stop; next += 64) _mm_prefetch(next, _MM_HINT_T1); \
  stop += share
#define FUSED_RNN_FOUR    \
  FUSED_RNN_ONE(0, 4, 6); \
  FUSED_RNN_ONE(1, 4, 7); \
  FUSED_RNN_ONE(2, 5, 6); \
  FUSED_RNN_ONE(3, 5, 7)

template <int kRowParts, int kPanelParts>
void product_of_two(const PartsCall& call, int vector) {
  const int64_t blocks = depth_blocks(call.depth), out_stride = call.out_stride * static_cast<int64_t>(sizeof(float));
  const uint16_t *rows = call.rows, *more_rows = rows + blocks * kRowParts * kPartsTile;
  const uint16_t* panel = call.panel + vector * kPanelParts * kPartsTile;
  float *out = call.out + vector * kPartsColumns, *more_out = out + kPartsRows * call.out_stride;
  if (call.add || call.init) {
    const float* start = call.add ? out : call.init + vector * kPartsColumns;
    const float* more_start = call.add ? more_out : start;
    const int64_t stride = call.add ? out_stride : 0;
    _tile_loadd(0, start, stride);
    _tile_loadd(1, start + kPartsColumns, stride);
    _tile_loadd(2, more_start, stride);
    _tile_loadd(3, more_start + kPartsColumns, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const Prefetch& prefetch = call.prefetch;
  const char* next = prefetch.from + vector * (prefetch.step * blocks / call.vectors);
  const int64_t share = prefetch.step / (2 * call.vectors * pairs_of_parts({kRowParts, kPanelParts}));
  const char* stop = next + share;
  for (int64_t block = 0; block < blocks; ++block) {
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
    rows += kRowParts * kPartsTile;
    more_rows += kRowParts * kPartsTile;
    panel += call.vectors * kPanelParts * kPartsTile;
    if (call.background.run) {
      const int64_t rounds = blocks * call.vectors / 2;
      call.background.run(call.background.context, blocks * vector / 2 + block, rounds);
    }
  }
  _tile_stored(0, out, out_stride);
  _tile_stored(1, out + kPartsColumns, out_stride);
  _tile_stored(2, more_out, out_stride);
  _tile_stored(3, more_out + kPartsColumns, out_stride);
}
#undef FUSED_RNN_ROWS
#undef FUSED_RNN_PANEL
#undef FUSED_RNN_ONE
#undef FUSED_RNN_FOUR

template <int kRowParts, int kPanelParts>
void product_of_vectors(const PartsCall& call) {
  if (call.n_rows > kPartsRows) {
    configure(kPartsRows);
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

void gemm(const PartsCall& call) {
  if (call.parts.rows == 3) return product_of_vectors<3, 3>(call);
  if (call.parts.panels == 2) return product_of_vectors<2, 2>(call);
  if (call.parts.rows == 2) return product_of_vectors<2, 1>(call);
  return product_of_vectors<1, 1>(call);
}

// ---- weights as they lie ----

// How far ahead of its use a line of weights is asked for: the rows of a tile are pages apart, more than the processor's own
// prefetching keeps track of.
constexpr int64_t kAheadBytes = 512;

// Cuts 32 k of up to 16 rows of weights into the tiles of their parts.
template <class Storage>
void pack_weights(const Storage* from, int64_t stride, int lanes, int64_t depth, int parts, uint16_t* tiles,
                  Largest& largest) {
  const int low = lanes_left(depth, 0), high = lanes_left(depth, 16);
  for (int lane = 0; lane < kPartsRows; ++lane, from += stride) {
    __m512 a = _mm512_setzero_ps(), b = a;
    if (lane < lanes) {
      for (int64_t i = 0; i < kPartsDepth * static_cast<int64_t>(sizeof(Storage)); i += 64)
        _mm_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes + i, _MM_HINT_T0);
      a = load16(from, low);
      if (high > 0) b = load16(from + 16, high);
    }
    store_parts<Storage>(a, b, parts, tiles + lane * kPartsDepth, largest);
  }
}

// Rows of a tile of sums are units: they become columns of `out`.
inline void store_transposed(const float* sums, const float* init, int rows, float* out, int64_t stride) {
  __m512i lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = _mm512_load_si512(sums + 16 * i);
  transpose(lanes);
  const __m512 start = init ? _mm512_loadu_ps(init) : _mm512_setzero_ps();
  for (int r = 0; r < rows; ++r) _mm512_storeu_ps(out + r * stride, _mm512_add_ps(start, _mm512_castsi512_ps(lanes[r])));
}

// Tiles 0 to 3: sums, of a vector's blocks of rows one after the other; 4 to 6: parts of weights; 7: parts of rows.
// With one part on both sides tiles are loaded as the weights lie: infinities then go where vectors bring them.
#define FUSED_RNN_WEIGHTS(v)                                                                     \
  {                                                                                              \
    constexpr bool kWhole = kRowParts == 1 && kAllParts<Storage> == 1;                           \
    const Storage* const from = static_cast<const Storage*>(call.weights[v]) + k;                \
    if (kWhole && call.lanes[v] == kPartsRows && left >= kPartsDepth) {                          \
      _tile_loadd(4, from, row_bytes);                                                           \
    } else {                                                                                     \
      uint16_t* const tiles = packed[(v) % 2];                                                   \
      asm volatile("" : : : "memory"); /* after the loads of the tiles that were there before */ \
      pack_weights(from, call.depth, call.lanes[v], left, kPanelParts, tiles, largest);          \
      asm volatile("" : : : "memory");                                                           \
      _tile_loadd(4, tiles, 64);                                                                 \
      if constexpr (kPanelParts > 1) _tile_loadd(5, tiles + kPartsTile, 64);                     \
      if constexpr (kPanelParts > 2) _tile_loadd(6, tiles + 2 * kPartsTile, 64);                 \
    }                                                                                            \
  }
#define FUSED_RNN_PART(b, i) _tile_loadd(7, rows + (b) * call.block_elements + (i) * kPartsTile, 64)
#define FUSED_RNN_MULTIPLY(n)                                           \
  if constexpr ((n) / kBlocks < kVectors) {                             \
    if constexpr ((n) % kBlocks == 0) FUSED_RNN_WEIGHTS((n) / kBlocks); \
    if constexpr (kRowParts > 2) {                                      \
      FUSED_RNN_PART((n) % kBlocks, 2);                                 \
      _tile_dpbf16ps(n, 4, 7);                                          \
    }                                                                   \
    if constexpr (kRowParts > 1) {                                      \
      FUSED_RNN_PART((n) % kBlocks, 1);                                 \
      if constexpr (kRowParts > 2) _tile_dpbf16ps(n, 5, 7);             \
      _tile_dpbf16ps(n, 4, 7);                                          \
    }                                                                   \
    FUSED_RNN_PART((n) % kBlocks, 0);                                   \
    if constexpr (kPanelParts > 2) _tile_dpbf16ps(n, 6, 7);             \
    if constexpr (kPanelParts > 1) _tile_dpbf16ps(n, 5, 7);             \
    _tile_dpbf16ps(n, 4, 7);                                            \
  }
#define FUSED_RNN_STORE(n)                                                                                           \
  if constexpr ((n) / kBlocks < kVectors) {                                                                          \
    constexpr int kVector = (n) / kBlocks, kBlock = (n) % kBlocks;                                                   \
    if (const int exist = call.n_rows - kBlock * kPartsRows; exist > 0) {                                            \
      _tile_stored(n, sums, 64);                                                                                     \
      asm volatile("" : : : "memory");                                                                               \
      store_transposed(sums, call.init ? call.init + kVector * kPartsColumns : nullptr, exist < 16 ? exist : 16,     \
                       call.out + kBlock * kPartsRows * call.out_stride + kVector * kPartsColumns, call.out_stride); \
    }                                                                                                                \
  }

template <class Storage, int kRowParts, int kPanelParts, int kBlocks, int kVectors>
bool direct_product(const DirectPartsCall& call) {
  alignas(64) uint16_t packed[2][kPanelParts * kPartsTile];
  alignas(64) float sums[kPartsRows * kPartsColumns];
  const int64_t row_bytes = call.depth * static_cast<int64_t>(sizeof(Storage));
  const uint16_t* rows = call.rows;
  Largest largest;
  configure(kPartsRows);
  asm volatile("" : : : "memory");  // the intrinsics do not say that they read memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < call.depth; k += kPartsDepth, rows += kRowParts * kPartsTile) {
    const int64_t left = call.depth - k;
    FUSED_RNN_MULTIPLY(0);
    FUSED_RNN_MULTIPLY(1);
    FUSED_RNN_MULTIPLY(2);
    FUSED_RNN_MULTIPLY(3);
  }
  FUSED_RNN_STORE(0);
  FUSED_RNN_STORE(1);
  FUSED_RNN_STORE(2);
  FUSED_RNN_STORE(3);
  return largest.has_parts();
}
#undef FUSED_RNN_WEIGHTS
#undef FUSED_RNN_PART
#undef FUSED_RNN_MULTIPLY
#undef FUSED_RNN_STORE

template <class Storage, int kRowParts, int kPanelParts>
bool direct_of_parts(const DirectPartsCall& call) {
  if (call.blocks == 4) return direct_product<Storage, kRowParts, kPanelParts, 4, 1>(call);
  if (call.blocks == 2) {
    return call.vectors == 1 ? direct_product<Storage, kRowParts, kPanelParts, 2, 1>(call)
                             : direct_product<Storage, kRowParts, kPanelParts, 2, 2>(call);
  }
  switch (call.vectors) {
    case 1: return direct_product<Storage, kRowParts, kPanelParts, 1, 1>(call);
    case 2: return direct_product<Storage, kRowParts, kPanelParts, 1, 2>(call);
    case 3: return direct_product<Storage, kRowParts, kPanelParts, 1, 3>(call);
    default: return direct_product<Storage, kRowParts, kPanelParts, 1, 4>(call);
  }
}

bool direct_of_float(const DirectPartsCall& call) { return direct_of_parts<float, 3, 3>(call); }
bool direct_of_half(const DirectPartsCall& call) { return direct_of_parts<Half, 2, 2>(call); }
bool direct_of_bfloat16(const DirectPartsCall& call) {
  return call.parts.rows == 1 ? direct_of_parts<BFloat16, 1, 1>(call) : direct_of_parts<BFloat16, 2, 1>(call);
}

}  // namespace
}  // namespace fused_rnn::cpu::amx
#pragma GCC pop_options

namespace fused_rnn::cpu {
namespace {

// The processor has AMX, and Linux lets this process use its registers (arch/x86/include/uapi/asm/prctl.h).
bool amx_available() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!avx512_kernels() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tile = edx >> 24 & 1, bf16_tile = edx >> 22 & 1;
  return tile && bf16_tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const InstructionSet* amx_kernels() {
  static const bool available = amx_available();
  if (!available) return nullptr;
  static const Kernels<float> f32 = [] {
    static const PartsKernels parts = [] {
      PartsKernels table = parts_packing();
      table.gains[0] = table.gains[1] = table.gains[2] = true;
      table.reads_once = true;
      table.rate = 16;
      table.gemm = amx::gemm;
      table.direct[0] = amx::direct_of_float;
      table.direct[1] = amx::direct_of_half;
      table.direct[2] = amx::direct_of_bfloat16;
      table.release = amx::release;
      return table;
    }();
    Kernels<float> table = avx512_kernels()->f32;
    table.parts = &parts;
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
