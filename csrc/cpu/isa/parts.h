// Products in bfloat16 parts: a matrix unit (AMX) or vectors (vdpbf16ps) multiply pairs of bfloat16 and sum in float.
//
// A value is the sum of up to three bfloat16 parts. Each part is the rounded remainder of the parts before it. Three parts
// hold all 24 bits of a float, two hold all 11 bits of a float16, one is a bfloat16. The product of two values is the sum
// over pairs of their parts; pairs that count less than float's last bit are left out.
//
// Rows and panels are arrays of tiles of 1 KB. A row tile is [16 rows][32 k]; the rows of a block are [K /
// 32][parts][tile]. A panel tile is [16 pairs of k][16 columns][2]; a panel is [K / 32][vectors][parts][tile]. K is padded
// with zeros.
#pragma once
#include <cstdint>

namespace fused_rnn::cpu {

constexpr int kPartsRows = 16;
constexpr int kPartsColumns = 16;
constexpr int kPartsDepth = 32;
constexpr int64_t kPartsTile = kPartsRows * kPartsDepth;  // elements of a tile
constexpr int64_t depth_blocks(int64_t depth) { return (depth + kPartsDepth - 1) / kPartsDepth; }

// What to bring into L2 during a product: each round of the product's loop asks for the next `step` bytes.
struct Prefetch {
  const char* from = nullptr;
  int64_t step = 0;
};

// What call `call` of `calls` calls fetches of the `bytes` at `from`.
inline Prefetch prefetch_share(const void* from, int64_t bytes, int64_t calls, int64_t call, int64_t rounds) {
  if (!from) return {};
  return {static_cast<const char*>(from) + bytes / calls * call, bytes / (calls * rounds)};
}

// Work for the vector units while the matrix unit is busy: the kernel calls run(context, round, rounds) for each round in
// turn.
struct Background {
  void (*run)(void* context, int64_t round, int64_t rounds) = nullptr;
  void* context = nullptr;
};

// The magnitude, as bits of a float, from which on values have no parts: they round to an infinity, or are one, or NaN.
constexpr uint32_t kLeastWithoutParts = 0x7f7f8000;

// How many parts a value has, in the rows and in the panels of a product: (1, 1), (2, 1), (2, 2) or (3, 3). The product
// leaves out the pairs of parts i and j with i + j >= rows.
struct Parts {
  int rows = 0, panels = 0;
};
// Pairs of parts that a product multiplies.
constexpr int pairs_of_parts(Parts parts) { return parts.rows == 3 ? 6 : parts.rows + parts.panels - 1; }

// out[r][c] = init[c] (or out[r][c] with `add`) + sum_k rows[r][k] panel[k][c]
struct PartsCall {
  int64_t depth;
  Parts parts;
  const uint16_t* rows;  // one block of 16, or two
  int n_rows;            // at most 16; or 32, where `vectors` is even
  int vectors;
  const uint16_t* panel;
  const float* init;  // [vectors][16] or null (zeros)
  bool add;
  float* out;          // [n_rows][vectors][16]
  int64_t out_stride;  // from row to row
  Prefetch prefetch;   // rounds: K / 32
  Background background;
};

// The same product with weights as torch stores them: no panel is packed, and memory is read once. The weights' rows are the
// rows of tiles, cut into parts on their way; the rows of the product are columns of tiles, as those of a panel.
//   out[r][v * 16 + u] = init[v * 16 + u] + sum_k rows[r][k] weights[v][u][k]
constexpr int kMostRowBlocks = 4;  // blocks of 16 rows times vectors of a call: each has a tile of sums
struct DirectPartsCall {
  int64_t depth;
  Parts parts;
  const uint16_t* rows;                 // [blocks][K / 32][parts][tile], tiles of panels
  int64_t block_elements;               // from block to block
  int blocks;                           // of 16 rows: 1, 2 or 4
  int n_rows;                           // that exist
  int vectors;                          // at most kMostRowBlocks / blocks
  const void* weights[kMostRowBlocks];  // of each vector: [lanes][K] storage
  int lanes[kMostRowBlocks];            // rows of it that exist, at most 16
  const float* init;                    // [vectors][16] or null (zeros)
  float* out;
  int64_t out_stride;  // from row to row
};

// The source of a vector of 16 columns, or of a tile of 16 rows.
struct PartsSource {
  const void* from;
  int64_t stride;  // elements from lane to lane (transposed) or from k to k (straight)
  int lanes;       // columns or rows that exist; the others become zero
  int64_t depth;
};

struct PartsKernels {
  bool gains[3] = {};       // by storage index (kernels.h): whether products in parts are faster than vectors
  bool reads_once = false;  // a call of up to 16 rows reads its panel once
  int rate = 0;             // rows that a pair of parts serves in the time of one multiply-add of vectors
  // Packs up to 16 rows, by storage index. Returns a bit for each row that has a value without parts: infinite, NaN, or
  // rounded to infinity.
  uint32_t (*pack_rows[3])(const void* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out);
  // Pack a vector of columns: each is a row of the source (transposed), or a column of it (straight). By storage index;
  // `stride` elements of `out` from one block of k to the next. They return whether all values have parts.
  bool (*pack_transposed[3])(const PartsSource& source, int parts, uint16_t* out, int64_t stride);
  bool (*pack_straight[3])(const PartsSource& source, int parts, uint16_t* out, int64_t stride);
  // Pack a quarter of a row tile, of up to 16 rows (`lanes`) and 32 k: each is a row of the source (block), or a column of
  // it (columns). The tiles of all parts follow one another. They return whether all values have parts.
  bool (*pack_block[3])(const PartsSource& source, int parts, uint16_t* tile, int quarter);
  bool (*pack_columns[3])(const PartsSource& source, int parts, uint16_t* tile, int quarter);
  void (*gemm)(const PartsCall& call);
  // By the weights' storage index; null where there is none. They return whether all weights have parts, or need none:
  // products of one part each way are those of vectors, infinities too.
  bool (*direct[3])(const DirectPartsCall& call) = {};
  // Hands the registers of the matrix unit back: every thread that called gemm or direct calls this at the end.
  void (*release)();
};
// A table with the packing functions of AVX-512 alone.
PartsKernels parts_packing();

}  // namespace fused_rnn::cpu
