// Products of bfloat16 pairs with sums in float, on a matrix unit (AMX) or on vectors (vdpbf16ps): a float is kept as the sum of up to
// three bfloat16 parts, each the rounded remainder of those before it, and the product of two such sums leaves out the pairs of parts
// that count less than the last bit. Three parts hold all 24 bits of a float, two all 11 of a float16, one is a bfloat16.
//
// Rows and panels are arrays of tiles of 1 KB. A row tile is [16 rows][32 k]; rows of a block are [K / 32][parts][tile]. A
// panel tile is [16 pairs of k][16 columns][2]; a panel is [K / 32][vectors][parts][tile]. K is padded with zeros.
#pragma once
#include <cstdint>

namespace fused_rnn::cpu {

constexpr int kPartsRows = 16;
constexpr int kPartsColumns = 16;
constexpr int kPartsDepth = 32;
constexpr int64_t kPartsTile = kPartsRows * kPartsDepth;  // elements of a tile
constexpr int64_t depth_blocks(int64_t depth) { return (depth + kPartsDepth - 1) / kPartsDepth; }

// What to bring into L2 while a product is made: its loop has some number of rounds, and each asks for the next `step` bytes.
struct Prefetch {
  const char* from = nullptr;
  int64_t step = 0;
};

// What call `call` of `calls` calls fetches of the `bytes` at `from`.
inline Prefetch prefetch_share(const void* from, int64_t bytes, int64_t calls, int64_t call, int64_t rounds) {
  if (!from) return {};
  return {static_cast<const char*>(from) + bytes / calls * call, bytes / (calls * rounds)};
}

// Work on vectors to be done while the matrix unit is busy: run(context, round, rounds) is called for each round in turn.
struct Background {
  void (*run)(void* context, int64_t round, int64_t rounds) = nullptr;
  void* context = nullptr;
};

// Of the rows and of the panels of a product: (1, 1), (2, 1), (2, 2) or (3, 3). Left out are the pairs i, j with i + j >= rows.
struct Parts {
  int rows = 0, panels = 0;
};
// Pairs of parts that a product needs: of three parts each, those that reach float's accuracy.
constexpr int pairs_of_parts(Parts parts) { return parts.rows == 3 ? 6 : parts.rows + parts.panels - 1; }

// out[r][c] = init[c] (or out[r][c] with `add`) + sum_k rows[r][k] panel[k][c]
struct PartsCall {
  int64_t depth;
  Parts parts;
  const uint16_t* rows;  // one block; two
  int n_rows;            // at most 16; or 32, with an even number of vectors
  int vectors;
  const uint16_t* panel;
  const float* init;  // [vectors][16] or null (zeros)
  bool add;
  float* out;          // [n_rows][vectors][16]
  int64_t out_stride;  // from row to row
  Prefetch prefetch;   // rounds: K / 32
  Background background;
};

// Where to take a vector of 16 columns from.
struct PartsSource {
  const void* from;
  int64_t stride;  // elements from lane to lane (transposed) or from k to k (straight)
  int lanes;       // columns that exist; the others become zero
  int64_t depth;
};

struct PartsKernels {
  bool gains[3] = {};       // by storage index (kernels.h): whether products of parts are worth it
  bool reads_once = false;  // a call of up to 16 rows reads its panel once
  int rate = 0;             // a product takes the time of one multiply-add of vectors for so many rows and each k
  // Packs up to 16 rows; returns a bit for each of them with a value that has no parts: infinite, or rounded to infinity.
  uint32_t (*pack_rows)(const float* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out);
  // Packs a vector of columns by storage index (kernels.h), each a row of the source, or a column of it; `stride` elements of
  // `out` from one block of k to the next. Returns whether all values have parts.
  bool (*pack_transposed[3])(const PartsSource& source, int parts, uint16_t* out, int64_t stride);
  bool (*pack_straight[3])(const PartsSource& source, int parts, uint16_t* out, int64_t stride);
  // Packs a quarter of a row tile of up to 16 rows (`lanes`) and 32 k, each a row of the source, or a column of it; the tiles of all parts
  // follow one another. Returns as the functions above.
  bool (*pack_block[3])(const PartsSource& source, int parts, uint16_t* tile, int quarter);
  bool (*pack_columns[3])(const PartsSource& source, int parts, uint16_t* tile, int quarter);
  void (*gemm)(const PartsCall& call);
  // Every thread that called gemm calls it at the end: hands the unit's registers back.
  void (*release)();
};
// The packing functions of AVX-512; the rest is not set.
PartsKernels parts_packing();

}  // namespace fused_rnn::cpu
