// Geometry of the persistent families `grid` and `cluster`, shared by their kernels (compile time) and the planner (run time).
// No CUDA include.
//
// One launch runs a layer over the whole sequence. A slice of 16 * kUnitTiles hidden units, with all gates of each, belongs to
// one block of kPersistentThreads threads; the blocks of all slices form a group, which serves some batch rows, in tiles of 8,
// of one direction. Groups are independent. In each step a block multiplies its weights by the state (forward: h; backward:
// the gradients of the gates) of all units, which the blocks of its group exchange:
//   acc[m][b] = sum_k A[m][k] x[k][b]
//   forward   A[(gate, unit)][k] = W_hh[gate][unit][k]      M = 16 * kUnitTiles * G, K = H
//   backward  A[unit][(gate, k)] = W_hh[gate][k][unit]      M = 16 * kUnitTiles,     K = G * H
// K is cut into chunks of kStep (16 for 16-bit types, else 8), which are dealt to the warps in turn: warp w owns chunks
// w, w + 8, ... with all M rows. The weights of its first kRegisterChunks chunks lie in its registers, those of the others in
// shared memory, from the first step to the last; the warps' partial sums are added through shared memory in a fixed order.
// Units from H on and rows from B on are zeros that the kernels make; the user's tensors are never padded.
#pragma once
#include "params.h"
#include "tiles.h"

namespace fused_rnn::cuda {

constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = 32 * kPersistentWarps;
constexpr int kTileUnits = 16;  // of the M side of a fragment
constexpr int kTileRows = 8;    // batch rows of a fragment
constexpr int kMaxBatchTiles = 8;

struct PersistentShape {
  CellKind cell;
  MathKind math;
  int unit_tiles;
  bool backward;
};

constexpr FUSED_RNN_HD int chunk_step(MathKind math) { return math >= MathKind::kFp16 ? 16 : 8; }
constexpr FUSED_RNN_HD int slice_units(PersistentShape s) { return kTileUnits * s.unit_tiles; }
constexpr FUSED_RNN_HD int m_tiles(PersistentShape s) { return s.unit_tiles * (s.backward ? 1 : gate_count(s.cell)); }
// Gates that a slice publishes in each step: 1 state forward, gradients of all gates backward.
constexpr FUSED_RNN_HD int published(PersistentShape s) { return s.backward ? gate_count(s.cell) : 1; }
constexpr FUSED_RNN_HD int chunk_count(PersistentShape s, int slices) {
  return published(s) * slices * slice_units(s) / chunk_step(s.math);
}
constexpr FUSED_RNN_HD int chunks_per_warp(PersistentShape s, int slices) {
  return (chunk_count(s, slices) + kPersistentWarps - 1) / kPersistentWarps;
}

// Chunks whose state is requested at once; two such batches are under way.
constexpr FUSED_RNN_HD int chunk_batch(PersistentShape s) {
  if (s.backward) return s.unit_tiles == 1 ? 8 : 4;
  const int tiles = m_tiles(s);
  if (s.math == MathKind::kFp32) return tiles > 9 ? 1 : tiles > 4 ? 2 : 4;
  return tiles > 9 ? 2 : tiles == 9 ? 3 : tiles % 3 == 0 ? 5 : 4;
}
// Registers of a thread that hold weights, 4 for a chunk and tile of M: as many as leave no spills (ptxas, sm_80 to sm_120).
constexpr FUSED_RNN_HD int register_chunks(PersistentShape s) {
  const int registers = s.backward || s.math == MathKind::kFp32 ? 96 : 128;
  const int chunks = registers / 4 / m_tiles(s) / chunk_batch(s) * chunk_batch(s);
  return chunks > 0 ? chunks : chunk_batch(s);
}

// Bytes of one chunk's fragment for one tile of M: 4 registers of 32 lanes.
constexpr int kFragmentBytes = 4 * 32 * 4;
// Partial sums of one warp: [tile of M][batch row][unit], rows padded so that neither side meets a bank twice.
constexpr int kPartialPitch = 20;
constexpr FUSED_RNN_HD int partial_floats(PersistentShape s) { return m_tiles(s) * kTileRows * kPartialPitch; }
// Scratch of a warp for fp32: two chunks [k][batch row], the upper half of k 4 floats further.
constexpr int kScratchFloats = 2 * (chunk_step(MathKind::kFp32) * kTileRows + 4 + 4);
// The states of one exchange, for one tile of rows: 2 words per lane and chunk.
constexpr FUSED_RNN_HD int exchange_words(PersistentShape s, int slices) { return chunk_count(s, slices) * 64; }

// Dynamic shared memory of a block, in this order, each part a multiple of 16 bytes.
struct PersistentSmem {
  int weights;   // [warp][chunk beyond the registers][tile of M][lane][4] words
  int partials;  // [2][warp] partial sums, used in turn
  int scratch;   // [warp], fp32 only
  int state;     // [2: h and c, or their gradients][tile][row][unit of the slice] floats
  int lengths;   // [tile][row]: number of active steps
  int barriers;  // cluster: [2][tile]
  int exchange;  // cluster: [2][tile] exchange_words
  int total;
};
constexpr FUSED_RNN_HD int smem_chunks(PersistentShape s, int slices) {
  const int chunks = chunks_per_warp(s, slices) - register_chunks(s);
  return chunks > 0 ? chunks : 0;
}
constexpr FUSED_RNN_HD PersistentSmem persistent_smem(PersistentShape s, int slices, int tiles, bool cluster) {
  PersistentSmem m{};
  int at = 0;
  m.weights = at;
  at += kPersistentWarps * smem_chunks(s, slices) * m_tiles(s) * kFragmentBytes;
  m.partials = at;
  at += 2 * kPersistentWarps * partial_floats(s) * 4;
  m.scratch = at;
  if (s.math == MathKind::kFp32) at += kPersistentWarps * kScratchFloats * 4;
  m.state = at;
  at += 2 * tiles * kTileRows * slice_units(s) * 4;
  m.lengths = at;
  at += tiles * kTileRows * 8;
  m.barriers = at;
  if (cluster) at += 2 * tiles * 8;
  m.exchange = at;
  if (cluster) at += 2 * tiles * exchange_words(s, slices) * 4;
  m.total = at;
  return m;
}
// Global memory of the exchange of family `grid`, for one group: [2][tile] tagged words.
constexpr FUSED_RNN_HD int64_t grid_exchange_bytes(PersistentShape s, int slices, int tiles) {
  return int64_t{2} * tiles * exchange_words(s, slices) * 8;
}

// What a launch covers; blocks are numbered [direction][group][slice].
struct PersistentLaunch {
  int slices;  // blocks of a group
  int groups;  // of each direction in this launch
  int tiles;   // of 8 batch rows, of a group
  int first_dir;
  int64_t first_row;
  void* exchange;  // grid: grid_exchange_bytes for each group, zeros; cluster: null
};
struct ForwardSequence {
  ForwardParams p;
  PersistentLaunch l;
};
struct BackwardSequence {
  BackwardParams p;
  PersistentLaunch l;
};
using ForwardSequenceKernel = void (*)(ForwardSequence);
using BackwardSequenceKernel = void (*)(BackwardSequence);

// One specialisation per kind of arithmetic and family, in grid_*.cu and cluster_*.cu. cell: any of the kinds (RNN kinds share
// their kernels).
template <MathKind kMath>
struct GridKernels {
  static ForwardSequenceKernel forward(CellKind cell);
  static BackwardSequenceKernel backward(CellKind cell);
};
template <MathKind kMath>
struct ClusterKernels {
  static ForwardSequenceKernel forward(CellKind cell, int unit_tiles);
  static BackwardSequenceKernel backward(CellKind cell, int unit_tiles);
};

// Fills memory with zeros; in front of a launch of family `grid`.
struct ZeroFill {
  void* memory;    // aligned to 16 bytes
  int64_t pieces;  // of 16 bytes
};

}  // namespace fused_rnn::cuda
