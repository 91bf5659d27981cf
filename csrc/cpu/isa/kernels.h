// What an instruction set provides: a table of functions for one arithmetic type A (float or double). The scans
// (forward.cpp, backward.cpp) are written once on top of it.
//
// W is the number of A in a vector. A packed matrix [K, columns] is a row of panels. A panel is [K][vectors][W], or two
// halves of that (Kernels::halves), so narrow that the sums of kMaxTileRows rows with it stay in registers. The columns of a
// gate matrix have the order [unit / W][gate][unit % W]: the gates of W units are neighbours.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "cpu/isa/parts.h"
#include "cpu/isa/storage.h"

namespace fused_rnn::cpu {

constexpr int kMaxTileRows = 8;
constexpr int kMaxTileVectors = 4;
constexpr int kMaxTilePanels = 4;
constexpr int kMaxVectorBytes = 64;
constexpr int kStorages = 3;  // float: float, Half, BFloat16; double: double only

constexpr int storage_index(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return 1;
    case DType::kBFloat16: return 2;
    case DType::kFloat32:
    case DType::kFloat64: break;  // each the first of its arithmetic type
  }
  return 0;
}

// out[r][c] = init[c] + sum_k rows[r][k] panels[k][c]
template <class A>
struct GemmCall {
  int64_t depth;         // K
  const A* const* rows;  // [n_rows] pointers to [K]
  int n_rows;            // at most Kernels::max_rows[vectors]
  int n_panels;          // at most Kernels::max_panels_of(n_rows)
  int vectors;           // of every panel here
  const A* panels;       // [n_panels][K][vectors][W] or by halves, or columns of a row-major matrix
  int64_t k_stride;      // from k to k + 1
  int64_t half_stride;   // from the first two vectors of a panel of four to the other two, where Kernels::halves
  int64_t panel_stride;  // from panel to panel
  const A* init;         // [n_panels][vectors][W] or null (zeros)
  A* out;                // [n_rows][n_panels][vectors][W]
  int64_t out_stride;    // from row to row
  Prefetch prefetch;     // rounds: K
};

// The same product with a matrix as torch stores it, [gates, units, K] row-major. It serves few rows, for which packing
// would take longer than the product. out has the order of a gate matrix.
template <class A>
struct DirectCall {
  int64_t depth;         // K
  const A* const* rows;  // [n_rows] pointers to [K]
  int n_rows;
  const void* weights;
  int64_t units;
  int gates;
  int64_t first, last;  // columns, in vectors
  const A* init;        // of column `first` on, or null
  A* out;
  int64_t out_stride;
};

// The arrays of one active row at one step. Arrays of A are padded to whole vectors, arrays in storage are not.
template <class A>
struct ForwardRow {
  const A* h_prev;  // [H] (unused with an output projection)
  const A* c_prev;  // [H]
  A* h;             // [H]
  A* c;             // [H]
  void* y;          // [H] storage or null
  void* gates;      // [S, H] storage or null
  void* cs;         // [H] storage or null
};
// What modifies the step of one row (core/modifier.h), beside numbers that are the same for all rows. Null where not asked
// for. Arrays of A are padded.
template <class A>
struct StepRow {
  const bool *keep_h, *keep_c;  // [H]
  const A* candidate;           // [H]
  const A* product;             // [H], of backward without an output projection
};
template <class A>
struct StepNumbers {
  A share_h, share_c;  // of zoneout without flags
  A clip;              // infinity: none
};
// What the layer's own forward read and left, of a row of a scan of tangents. All in storage.
struct PrimalRow {
  const void *gates, *h_prev, *c_prev, *y;  // as BackwardRow's
  const void* source;                       // [S, H] added to the tangents of the accumulators, or null
};
template <class A>
struct ForwardCall {
  const A* rec;  // [n_rows][..] recurrent product, in gate matrix order from the call's first unit
  int64_t rec_stride;
  const A* xg;  // [n_rows][..] projection, likewise
  int64_t xg_stride;
  const ForwardRow<A>* rows;
  int n_rows;
  int64_t H;
  int64_t first, last;  // vectors of units
  // Of a modified step, else null.
  const StepRow<A>* options = nullptr;  // [n_rows]
  const StepNumbers<A>* numbers = nullptr;
  const PrimalRow* primal = nullptr;  // [n_rows] of a scan of tangents, else null
};

template <class A>
struct BackwardRow {
  const void* gates;   // [S, H] storage or null (RNN)
  const void* h_prev;  // [H] storage
  const void* c_prev;  // [H] storage
  const void* c;       // [H] storage
  const void* y;       // [H] storage
  const void* dy;      // [H] storage
  const A* carry;      // [H] gradient of this step's h that goes past the recurrent weights
  A* carry_out;        // [H] the same of the previous step's h, or null
  A* dc;               // [H] gradient of this step's c from the next one; of the previous step's on return
  void* d_gates;       // [S, H] storage
  A* d_rec;            // [G, H] copy of the last G slots of d_gates in A, or null
  void* dh;            // [H] storage: the total gradient of h, of a step that nothing modifies; or null
  bool reset;          // the step began from zeros: carry and dc become zero
};
template <class A>
struct BackwardCall {
  const A* rec;  // [n_rows][..] gradient of h through the recurrent weights, from the call's first unit
  int64_t rec_stride;
  const BackwardRow<A>* rows;
  int n_rows;
  int64_t H;
  int64_t first, last;  // vectors of units
  // As forward's.
  const StepRow<A>* options = nullptr;
  const StepNumbers<A>* numbers = nullptr;
};

// Backward on dual numbers (core/dual.h): the arrays of values and of tangents. d_rec is null in both.
template <class A>
struct DualRow {
  BackwardRow<A> value, tangent;  // value.dh: what is there is read
  const A* rec;                   // [H] tangent of DualCall::rec
};
template <class A>
struct DualCall {
  const A* rec;  // as BackwardCall's, of the values; null where rows have dh
  int64_t rec_stride;
  const DualRow<A>* rows;
  int n_rows;
  int64_t H;
  int64_t first, last;  // vectors of units
};

// out = rec * scale + add + add_stored
template <class A>
struct StoreRow {
  const A* add;              // or null
  const void* add_stored;    // storage or null
  void* out;                 // storage or null
  A* out_arithmetic;         // padded, or null
  const A* scale = nullptr;  // padded, or null
};
template <class A>
struct StoreCall {
  const A* rec;
  int64_t rec_stride;
  const StoreRow<A>* rows;
  int n_rows;
  int64_t size;  // columns in all
  int64_t first, last;
  bool rounded;  // out_arithmetic takes the value as `out` stores it
};

// Keys of the hash in content_hash.h, random for each process.
constexpr int64_t kHashBlock = 2048;  // bytes
struct HashKeys {
  uint64_t words[kHashBlock / 8];
  uint64_t mix[16];
};
const HashKeys& hash_keys();

// to[k * step + lane] = from[lane * stride + k] (transpose.h)
template <class A>
struct TransposeCall {
  const A* from;
  int64_t stride;
  int64_t lanes, depth;
  A* to;
  int64_t step;
};

// Random bools (random_flags.h).
struct FlagsCall {
  uint64_t seed;
  uint32_t bound;  // a flag is true with a probability of bound / 2^32
  int64_t n;
  bool* out;  // [n]
};

template <class A>
struct Kernels {
  int width;                          // W
  int max_rows[kMaxTileVectors + 1];  // rows of a tile by vectors of its panel
  int max_panels[3];                  // of one gemm call, by its rows, where there are one or two
  bool halves;                        // a packed panel of four vectors is [2][K][2][W]: tiles take two at a time
  void (*gemm)(const GemmCall<A>&);
  void (*direct[kStorages])(const DirectCall<A>&);
  void (*forward[kCellCount][kStorages])(const ForwardCall<A>&);
  void (*backward[kCellCount][kStorages])(const BackwardCall<A>&);
  void (*forward_modified[kCellCount][kStorages])(const ForwardCall<A>&);
  void (*backward_modified[kCellCount][kStorages])(const BackwardCall<A>&);
  // Of storage A: forward of tangents, and backward of values and tangents.
  void (*tangents[kCellCount])(const ForwardCall<A>&);
  void (*dual_backward[kCellCount])(const DualCall<A>&);
  void (*store[kStorages])(const StoreCall<A>&);
  void (*load[kStorages])(const void* from, A* to, int64_t n);  // storage to arithmetic
  void (*save[kStorages])(const A* from, void* to, int64_t n);  // arithmetic to storage
  void (*transpose)(const TransposeCall<A>&);
  const PartsKernels* parts;  // products of bfloat16 parts, or null
  uint64_t (*hash)(const HashKeys& keys, const void* data, int64_t bytes, uint64_t before);  // content_hash.h
  void (*flags)(const FlagsCall&);

  // Vectors of a packed panel that lie together for each k: all, or half of them.
  int together(int vectors) const { return halves && vectors == kMaxTileVectors ? vectors / 2 : vectors; }
  // The most panels that one gemm call takes. Few rows need several panels at a time, to hide the latency of the FMA.
  int max_panels_of(int64_t n_rows) const { return n_rows <= 2 ? max_panels[n_rows] : 1; }
};

struct InstructionSet {
  const char* name;
  const Kernels<float>& f32;
  const Kernels<double>& f64;
};
// Null where this machine lacks the instructions, or the compiler did.
const InstructionSet* amx_kernels();
const InstructionSet* avx512_bf16_kernels();
const InstructionSet* avx512_kernels();
const InstructionSet* avx2_kernels();
const InstructionSet* portable_kernels();
bool avx512_bf16_is_fast();                // whether avx512_bf16 gains on avx512, in bfloat16
const InstructionSet& selected_kernels();  // see instruction_set()

// Whether matrices of this storage (its index) gain from products in parts.
template <class A>
bool gains_from_parts(const Kernels<A>& kernels, int storage) {
  return sizeof(A) == sizeof(float) && kernels.parts != nullptr && kernels.parts->gains[storage];
}

template <class A>
const Kernels<A>& kernels_of(const InstructionSet& set) {
  if constexpr (sizeof(A) == 8) {
    return set.f64;
  } else {
    return set.f32;
  }
}

}  // namespace fused_rnn::cpu
