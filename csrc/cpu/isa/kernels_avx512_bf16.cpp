// The product of parts.h on AVX-512's dot products of bfloat16 pairs (vdpbf16ps), for matrices of one part, which are
// stored in bfloat16. Only functions of this file may be compiled between the pragmas, for the reason that
// kernels_avx512.cpp gives.
#include "cpu/isa/blocks.h"
#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 in its own intrinsics
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace fused_rnn::cpu::avx512_bf16 {
namespace {

// Rows whose sums stay in registers, by vectors of the panel.
constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 8, 8, 6};

// The value in a register: as an operand in memory it would be loaded again for each product.
inline __m512bh load_pinned(const uint16_t* p) {
  __m512i value = _mm512_loadu_si512(p);
  asm("" : "+v"(value));
  return reinterpret_cast<__m512bh>(value);
}
inline __m512bh broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  __m512i value = _mm512_set1_epi32(pair);
  asm("" : "+v"(value));
  return reinterpret_cast<__m512bh>(value);
}

// kRows rows from `rows` on, which points into the tiles of call.rows, with one panel. For each pair of k the panel's
// vectors are loaded once and each row's pair is broadcast. All sums stay in registers.
template <int kVectors, int kRows, int kRowParts>
void product(const PartsCall& call, const uint16_t* rows, float* out, const Prefetch& prefetch) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* start = call.add ? out + r * call.out_stride : call.init;
      sums[r][v] = start ? _mm512_loadu_ps(start + v * kPartsColumns) : _mm512_setzero_ps();
    }
  }
  const uint16_t* panel = call.panel;
  const char* next = prefetch.from;
  const int64_t blocks = depth_blocks(call.depth);
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < prefetch.step; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
    next += prefetch.step;
    for (int pair = 0; pair < kPartsDepth; pair += 2) {
      __m512bh columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load_pinned(panel + v * kPartsTile + pair * kPartsColumns);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int part = kRowParts - 1; part >= 0; --part) {
          const __m512bh row = broadcast_pair(rows + part * kPartsTile + r * kPartsDepth + pair);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], columns[v], row);
        }
      }
    }
    rows += kRowParts * kPartsTile;
    panel += kVectors * kPartsTile;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * call.out_stride + v * kPartsColumns, sums[r][v]);
  }
}

using Product = void (*)(const PartsCall&, const uint16_t*, float*, const Prefetch&);

// The product for a number of vectors, of rows (at least 1), and of parts of the rows.
template <int kVectors, int kRows>
constexpr Product product_of(int row_parts) {
  if constexpr (kRows > kMaxRows[kVectors]) {
    return nullptr;
  } else {
    return row_parts == 1 ? product<kVectors, kRows, 1> : product<kVectors, kRows, 2>;
  }
}
template <int kVectors>
Product product_of(int rows, int row_parts) {
  switch (rows) {
    case 1: return product_of<kVectors, 1>(row_parts);
    case 2: return product_of<kVectors, 2>(row_parts);
    case 3: return product_of<kVectors, 3>(row_parts);
    case 4: return product_of<kVectors, 4>(row_parts);
    case 5: return product_of<kVectors, 5>(row_parts);
    case 6: return product_of<kVectors, 6>(row_parts);
    case 7: return product_of<kVectors, 7>(row_parts);
    default: return product_of<kVectors, 8>(row_parts);
  }
}
Product product_of(int vectors, int rows, int row_parts) {
  switch (vectors) {
    case 1: return product_of<1>(rows, row_parts);
    case 2: return product_of<2>(rows, row_parts);
    case 3: return product_of<3>(rows, row_parts);
    default: return product_of<4>(rows, row_parts);
  }
}

}  // namespace
}  // namespace fused_rnn::cpu::avx512_bf16
#pragma GCC pop_options

namespace fused_rnn::cpu {
namespace {

// The background goes first, while the tile that it reads is in L1: vector units have no time to spare beside a product.
void gemm(const PartsCall& call) {
  if (call.background.run) call.background.run(call.background.context, 0, 1);
  const int most = avx512_bf16::kMaxRows[call.vectors];
  const int64_t blocks = depth_blocks(call.depth), block_elements = blocks * call.parts.rows * kPartsTile;
  const int64_t whole = call.n_rows / kPartsRows * ((kPartsRows + most - 1) / most);
  const int64_t calls = whole + (call.n_rows % kPartsRows + most - 1) / most;
  int64_t done = 0;
  for_blocks(call.n_rows, kPartsRows, [&](int64_t block_row, int64_t block_rows) {
    for_row_blocks(block_rows, most, [&](int64_t row, int count) {
      const uint16_t* rows = call.rows + block_row / kPartsRows * block_elements + row * kPartsDepth;
      const Prefetch prefetch = prefetch_share(call.prefetch.from, call.prefetch.step * blocks, calls, done++, blocks);
      float* out = call.out + (block_row + row) * call.out_stride;
      avx512_bf16::product_of(call.vectors, count, call.parts.rows)(call, rows, out, prefetch);
    });
  });
}

bool available() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return avx512_kernels() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

}  // namespace

const InstructionSet* avx512_bf16_kernels() {
  static const bool has_it = available();
  if (!has_it) return nullptr;
  static const Kernels<float> f32 = [] {
    static const PartsKernels parts = [] {
      PartsKernels table = parts_packing();
      table.gains[storage_index(DType::kBFloat16)] = true;
      table.rate = 2;
      table.gemm = gemm;
      table.release = [] {};
      return table;
    }();
    Kernels<float> table = avx512_kernels()->f32;
    table.parts = &parts;
    return table;
  }();
  static const InstructionSet set{"avx512_bf16", f32, avx512_kernels()->f64};
  return &set;
}

// A vdpbf16ps takes as long as a multiply-add of floats on Zen 4 and 5. On Intel's cores with AMX, from Sapphire Rapids on,
// it takes as long as four (1.8 and 0.5 ns in a loop of 16 independent sums, 2026-11-21).
bool avx512_bf16_is_fast() { return !__builtin_cpu_is("intel") || __builtin_cpu_is("cooperlake"); }
}  // namespace fused_rnn::cpu
#else
namespace fused_rnn::cpu {
const InstructionSet* avx512_bf16_kernels() { return nullptr; }
bool avx512_bf16_is_fast() { return false; }
}  // namespace fused_rnn::cpu
#endif
