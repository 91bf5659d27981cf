#include "cpu/matrix_form.h"

#include "cpu/isa/blocks.h"

namespace fused_rnn::cpu {
namespace {

// Calls of up to this many rows (T * B) read the weights as they lie, by vectors unless a rule below asks for parts.
// Inference in fp32 on Sapphire Rapids, 2026-11-21: with 12 and 16 rows that takes 0.7 to 0.85 of the time of packed
// weights from the cache, and 0.4 to 0.8 of the time with packing; with 24 and 32 rows and H=128 it takes 1.1 to 1.5 times
// as long as packed weights from the cache.
constexpr int64_t kDirectRows = 16;
// With vectors of 32 bytes (AVX2) the tile of rows that read weights as they lie is as fast as that of packed ones, and a
// packed matrix costs a hash of all weights beside it. Where a matrix is read a few times only and is so deep that sums of
// lanes cost little, more rows then gain. Time with 16 rows at most / with more, EPYC with AVX2, fp32, inference, one
// thread, turn by turn, 2026-11-29: T=1 with 24 and 32 rows, H=256, 512, 1024: LSTM 1.04 to 1.29, RNN 1.10 to 1.31, GRU
// H=256 1.11 and 1.08; T*B=32 with T=2 and 4, H=512: LSTM 1.00 and 1.05, RNN 1.16 and 1.31. With 48 rows nothing is sure
// (0.82 to 1.14). A deep matrix of three gates loses at T=1 (GRU H=512 and 1024: 0.94 to 0.97), as its packed tiles have
// four rows.
constexpr int64_t kMoreDirectRows = 32, kFewProducts = 4, kDeep = 256, kDeepOfThreeGates = 512;
constexpr int kShortVectorBytes = 32;

int64_t most_direct_rows(const FormInput& in) {
  const bool deep = in.depth >= kDeep && (in.gates != 3 || in.depth < kDeepOfThreeGates);
  const bool gains = in.vector_bytes == kShortVectorBytes && !in.straight && deep && !in.gains_from_parts &&
                     in.all_rows <= kFewProducts * in.rows;
  return gains ? kMoreDirectRows : kDirectRows;
}

// Vector units take two multiply-adds a cycle and reach four fifths of their peak.
constexpr double kVectorRate = 2 * 0.8;
// A tile of the matrix unit takes 16 cycles, and packing the rows' parts adds a quarter.
constexpr double kTileCycles = 1.25 * 16;
// Weights of more than kL2Bytes come from beyond L2 at every step. Two more bytes for each element then cost more than
// parts gain for fewer rows than this.
constexpr int64_t kFewRows = 24;

// Weights as they lie, cut into parts on the way, are read once for up to 64 rows, and need neither a hash nor a cache. Time
// otherwise (up to 16 rows by vectors, else from the cache) / so, inference of one step, Sapphire Rapids with AMX, one
// thread, turn by turn, 2026-11-30, LSTM and RNN, H=128, 512, 1024:
//   bfloat16  2 rows 1.0 to 1.1, 4 rows 1.1 to 1.3, 8 rows 1.4 to 2.2, 16 rows 1.9 to 3.8, 32 and 64 rows 1.2 to 1.7 (H=128:
//             1.0); two and four steps of 4 to 32 rows, H=512, 1024: 1.0 to 1.9
//   float16   8 rows 0.8 to 1.0, 10 to 16 rows 1.1 to 1.6, 32 and 64 rows, H=512, 1024: 0.95 to 2.9 (H=128: 0.9); two and
//             four steps of 12 and 16 rows 1.1 to 1.4 (H=128: 0.7), of more rows 0.8 to 1.0
//   float32   12 rows 0.7 to 1.0, 16 rows 1.0 to 1.2, 32 and 64 rows, H=512, 1024: 1.0 to 3.6 (H=128: 0.9 to 1.2); two and
//             four steps, H=1024: 1.1 to 1.5, H=512: 0.8 to 1.2
// More than 64 rows read the weights again: 0.7 to 1.1.
struct DirectPartsRule {
  int64_t least_rows;
  int64_t least_depth;          // of more than kDirectRows rows in all
  int64_t least_depth_of_many;  // likewise, of several products
  int64_t most_rows_of_many;
};
constexpr DirectPartsRule kBFloat16Rule{2, 256, 256, 64}, kFloat16Rule{10, 512, 512, 16}, kFloat32Rule{16, 256, 1024, 64};
constexpr int64_t kMostRowsAtOnce = kMostRowBlocks * kPartsRows;

bool reads_parts_once(const FormInput& in) {
  const DirectPartsRule& rule = in.parts.panels == 1 ? kBFloat16Rule : in.parts.panels == 2 ? kFloat16Rule : kFloat32Rule;
  if (in.rows < rule.least_rows || in.rows > kMostRowsAtOnce) return false;
  if (in.all_rows <= kDirectRows) return true;
  if (in.all_rows == in.rows) return in.depth >= rule.least_depth;
  return in.all_rows <= kFewProducts * in.rows && in.rows <= rule.most_rows_of_many && in.depth >= rule.least_depth_of_many;
}

}  // namespace

Parts parts_of(DType storage, bool rounded_rows) {
  switch (storage) {
    case DType::kFloat16: return {2, 2};
    case DType::kBFloat16: return {rounded_rows ? 1 : 2, 1};
    case DType::kFloat64:  // never multiplied in parts
    case DType::kFloat32: break;
  }
  return {3, 3};
}

Form choose_form(const FormInput& in) {
  if (in.direct_parts && !in.straight && in.depth > 0 && reads_parts_once(in)) return Form::kDirectParts;
  if (in.all_rows <= most_direct_rows(in)) return Form::kDirect;
  if (!in.gains_from_parts || in.depth == 0) return Form::kPacked;  // a matrix without depth has no tiles
  if (in.parts.panels == 1) return Form::kParts;                    // half the bytes, and faster for one row too
  // Cycles for each vector of columns.
  const int64_t tiles = depth_blocks(in.depth) * ceil_div(in.rows, kPartsRows);
  const double matrix_unit = kTileCycles * pairs_of_parts(in.parts) * static_cast<double>(tiles);
  const double vector_units = static_cast<double>(in.rows * in.depth) / kVectorRate;
  if (matrix_unit > vector_units) return Form::kPacked;
  const double bytes = static_cast<double>(in.depth * in.columns * in.parts.panels * 2);
  return bytes > kL2Bytes && in.rows < kFewRows ? Form::kPacked : Form::kParts;
}

const char* to_string(Form form) {
  switch (form) {
    case Form::kDirect: return "as they lie";
    case Form::kPacked: return "packed into panels";
    case Form::kDirectParts: return "as they lie, in bfloat16 parts";
    case Form::kParts: break;
  }
  return "in bfloat16 parts";
}

}  // namespace fused_rnn::cpu
