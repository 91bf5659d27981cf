// Geometry of the persistent families `grid` and `cluster`, shared by their kernels (compile time) and the planner (run
// time). No CUDA include.
//
// One launch runs a layer over the whole sequence. A block of kPersistentThreads threads owns a slice: 16 * kUnitTiles
// hidden units, with all gates of each. The blocks of all slices form a group. A group serves some batch rows of one
// direction, in row tiles of 8 rows; groups are independent. The weights lie in registers and shared memory from the first
// step to the last, as fragments of 16 rows by one chunk of kStep columns (16 for 16-bit types, else 8). A step makes one of
// two products.
//
// gather: the blocks of a group exchange the states of all units (forward: h; backward: the gradients of the gates), and a
// block multiplies its weights by them:
//   acc[m][b] = sum_k A[m][k] x[k][b]
//   forward   A[(gate, unit)][k] = W_hh[gate][unit][k]      M = 16 * kUnitTiles * G, K = H
//   backward  A[unit][(gate, k)] = W_hh[gate][k][unit]      M = 16 * kUnitTiles,     K = G * H
// The warps form m_groups x k_groups: a warp owns 1 / m_groups of the tiles of M and every k_groups-th chunk of K. The
// weights of its first register_chunks chunks lie in its registers, the weights of the other chunks in shared memory. The
// partial sums of the k_groups are added through shared memory in a fixed order.
//
// scatter (backward of LSTM and GRU in a cluster): a block multiplies the gradients of its own gates by its weights. The
// result is a part of the gradient of every unit's state. Each part goes to the block that owns the unit, which adds the
// parts in the order of the blocks:
//   acc[k][b] = sum_(gate, unit) W_hh[gate][unit][k] d_gates[gate][unit][b]      M = H, K = 16 * kUnitTiles * G
// The tiles of M are dealt to the warps in turn. A warp's first register_tiles lie in its registers, with all chunks of K.
// Bytes that a block receives in a step, for each batch row:
//              gather, 16 bit   gather, fp32   scatter
//   LSTM            8 H             16 H          4 H
//   GRU             6 H             12 H          4 H
//   RNN             2 H              4 H          4 H      so an RNN gathers
// Family `grid` always gathers. Through L2, sending costs as much as receiving: to scatter, each block would send 4 H; to
// gather, it stores its slice's share once.
//
// The kernels make zeros for units from H on and rows from B on. The user's tensors are never padded.
#pragma once
#include "core/ceil_div.h"
#include "plan/math_kind.h"

namespace fused_rnn::cuda {

constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = 32 * kPersistentWarps;
constexpr int kTileUnits = 16;  // of the M side of a fragment
constexpr int kTileRows = 8;    // batch rows of a fragment
constexpr int kMaxRowTiles = 8;
constexpr int kMaxClusterBlocks = 16;

struct PersistentShape {
  CellKind cell;
  MathKind math;
  int unit_tiles;
  bool backward;
  bool cluster;
};

constexpr FUSED_RNN_HD int chunk_step(MathKind math) { return storage_bytes(math) == 2 ? 16 : 8; }
constexpr FUSED_RNN_HD int slice_units(PersistentShape s) { return kTileUnits * s.unit_tiles; }
constexpr FUSED_RNN_HD bool scatters(PersistentShape s) { return s.backward && s.cluster && gate_count(s.cell) > 1; }
// Gates that a slice publishes (or multiplies itself) in each step: 1 state forward, gradients of all gates backward.
constexpr FUSED_RNN_HD int published(PersistentShape s) { return s.backward ? gate_count(s.cell) : 1; }
// Whether the two halves of the threads take turns: in blocks of 16 units one half has all elements of a row tile.
constexpr FUSED_RNN_HD bool takes_turns(PersistentShape s) {
  return s.cluster && 2 * slice_units(s) * kTileRows == kPersistentThreads;
}

// ---- gather ----

constexpr FUSED_RNN_HD int m_tiles(PersistentShape s) { return s.unit_tiles * (s.backward ? 1 : gate_count(s.cell)); }
// In a cluster the choice balances traffic of shared memory: each of the m_groups reads all states, each of the k_groups
// writes and reads partial sums, m_groups * K / 16 * 256 + 2 * k_groups * m_tiles * 640 bytes (16 bit). In `grid` the states
// come from L2. With kFp32 a second group costs more for handing states to lanes than it saves; 12 tiles need it all the
// same, since their sums leave no registers for weights.
constexpr FUSED_RNN_HD int m_groups(PersistentShape s) {
  if (!s.cluster) return 1;
  const int tiles = m_tiles(s);
  if (s.math == MathKind::kFp32) return tiles >= 12 ? 2 : 1;
  return tiles >= 12 && tiles % 4 == 0 ? 4 : tiles >= 4 && tiles % 2 == 0 ? 2 : 1;
}
constexpr FUSED_RNN_HD int k_groups(PersistentShape s) { return kPersistentWarps / m_groups(s); }
constexpr FUSED_RNN_HD int warp_tiles(PersistentShape s) { return m_tiles(s) / m_groups(s); }
constexpr FUSED_RNN_HD int chunk_count(PersistentShape s, int slices) {
  return published(s) * slices * slice_units(s) / chunk_step(s.math);
}
constexpr FUSED_RNN_HD int chunks_per_warp(PersistentShape s, int slices) {
  return ceil_div(chunk_count(s, slices), k_groups(s));
}
// Chunks that are loaded together. In `grid`, whose states come from L2, two such batches are under way.
constexpr FUSED_RNN_HD int chunk_batch(PersistentShape s) {
  const int tiles = warp_tiles(s);
  if (s.cluster && m_groups(s) == 4) return 2;
  if (s.backward) return s.unit_tiles > 1 ? 4 : s.cluster ? 8 : 6;
  if (s.math == MathKind::kFp32) return tiles > 4 ? 2 : 4;
  return tiles == 9 ? 3 : tiles % 3 == 0 ? 5 : 4;
}
// Chunks in registers, 4 of a thread for a chunk and tile of M: as many as leave no spills (ptxas, sm_80 to sm_120).
constexpr FUSED_RNN_HD int register_chunks(PersistentShape s) {
  const int registers = s.backward || s.math == MathKind::kFp32 ? 96 : m_groups(s) == 4 ? 168 : 128;
  const int batch = chunk_batch(s), chunks = registers / 4 / warp_tiles(s) / batch * batch;
  return chunks > 0 ? chunks : batch;
}
constexpr FUSED_RNN_HD int smem_chunks(PersistentShape s, int slices) {
  const int chunks = chunks_per_warp(s, slices) - register_chunks(s);
  return chunks > 0 ? chunks : 0;
}
// Partial sums of one chunk group: [tile of M][batch row][unit], rows padded so that neither writers nor readers meet a bank
// twice.
constexpr int kPartialPitch = 20;
constexpr FUSED_RNN_HD int partial_floats(PersistentShape s) { return m_tiles(s) * kTileRows * kPartialPitch; }
// The states of one exchange, for one row tile: 2 words per lane and chunk.
constexpr FUSED_RNN_HD int exchange_words(PersistentShape s, int slices) { return chunk_count(s, slices) * 64; }

// ---- scatter ----

// Chunks of K, all of them of the block's own units. Tiles of M of one warp, at most.
constexpr FUSED_RNN_HD int scatter_chunks(PersistentShape s) { return published(s) * slice_units(s) / chunk_step(s.math); }
constexpr FUSED_RNN_HD int scatter_tiles(PersistentShape s, int slices) {
  return ceil_div(slices * s.unit_tiles, kPersistentWarps);
}
// Tiles of M in registers, 4 of a thread for each chunk: as many as leave no spills.
constexpr FUSED_RNN_HD int register_tiles(PersistentShape s) {
  const int most = scatter_tiles(s, kMaxClusterBlocks),
            tiles = (s.math == MathKind::kFp32 ? 128 : 144) / 4 / scatter_chunks(s);
  return tiles > most ? most : tiles;
}
constexpr FUSED_RNN_HD int smem_tiles(PersistentShape s, int slices) {
  const int tiles = scatter_tiles(s, slices) - register_tiles(s);
  return tiles > 0 ? tiles : 0;
}
// Partial gradients of one exchange, for one row tile: [block][row][unit of the slice] floats.
constexpr FUSED_RNN_HD int scatter_floats(PersistentShape s, int slices) { return slices * kTileRows * slice_units(s); }

// ---- memory ----

// How many row tiles have their running states (h and c, or their gradients) in registers: the first one, or none. There is
// none where the weights leave no room (ptxas), where two threads take turns, and in `grid`, whose packets under way take
// that room.
constexpr FUSED_RNN_HD int row_tiles_in_registers(PersistentShape s) {
  return !s.cluster || s.unit_tiles == 3 || takes_turns(s) ? 0 : 1;
}
// Bytes of one fragment: 4 registers of 32 lanes.
constexpr int kFragmentBytes = 4 * 32 * 4;
// fp32: room for the states of one chunk, [k][batch row], with a gap of 4 floats before the upper half of k. A warp uses two
// in turn.
constexpr int kScratchFloats = chunk_step(MathKind::kFp32) * kTileRows + 4 + 4;
// Words of a chunk of the block's own gradients, in the order in which its warps read them.
constexpr FUSED_RNN_HD int own_words(MathKind math) { return math == MathKind::kFp32 ? kScratchFloats : 64; }

// Fragments that a warp's registers have room for.
constexpr FUSED_RNN_HD int register_fragments(PersistentShape s) {
  return scatters(s) ? register_tiles(s) * scatter_chunks(s) : register_chunks(s) * warp_tiles(s);
}
// Fragments of one warp: all of them, those in registers, those in shared memory.
struct FragmentCount {
  int total, in_registers, in_smem;
};
constexpr FUSED_RNN_HD FragmentCount fragment_count(PersistentShape s, int slices) {
  const int each = scatters(s) ? scatter_chunks(s) : warp_tiles(s);
  const int total = each * (scatters(s) ? scatter_tiles(s, slices) : chunks_per_warp(s, slices));
  const int in_smem = each * (scatters(s) ? smem_tiles(s, slices) : smem_chunks(s, slices));
  return {total, total - in_smem, in_smem};
}

// Dynamic shared memory of a block, in this order, each part a multiple of 16 bytes. Every part up to `weights` begins at a
// constant of the kernel, so that no register holds its place.
struct PersistentSmem {
  int lengths;   // [kMaxRowTiles][row]: number of active steps, 32 bits
  int biases;    // forward: [gate][unit of the slice] floats, b_hh
  int barriers;  // cluster: [2][kMaxRowTiles]
  int partials;  // gather: [2][chunk group] partial sums, used in turn
                 // scatter: [2][chunk] own_words: gradients of the slice's gates, used in turn
  int scratch;   // gather, fp32 only: [warp][2] scratch
  int weights;   // gather: [warp][chunk beyond the registers][tile of M of the warp][lane][4] words
                 // scatter: [warp][tile of M beyond the registers][chunk][lane][4] words
  int state;     // [row tile beyond row_tiles_in_registers][2: h and c, or their gradients][row][unit of the slice] floats
  int exchange;  // cluster: [2][row tile] exchange_words or scatter_floats
  int total;
};
constexpr FUSED_RNN_HD PersistentSmem persistent_smem(PersistentShape s, int slices, int row_tiles) {
  PersistentSmem m{};
  int at = 0;
  m.lengths = at;
  at += kMaxRowTiles * kTileRows * 4;
  m.biases = at;
  if (!s.backward) at += gate_count(s.cell) * slice_units(s) * 4;
  m.barriers = at;
  if (s.cluster) at += 2 * kMaxRowTiles * 8;
  m.partials = at;
  at += 2 * 4 * (scatters(s) ? scatter_chunks(s) * own_words(s.math) : k_groups(s) * partial_floats(s));
  m.scratch = at;
  if (!scatters(s) && s.math == MathKind::kFp32) at += kPersistentWarps * 2 * kScratchFloats * 4;
  m.weights = at;
  at += kPersistentWarps * fragment_count(s, slices).in_smem * kFragmentBytes;
  m.state = at;
  at += 2 * (row_tiles - row_tiles_in_registers(s)) * kTileRows * slice_units(s) * 4;
  m.exchange = at;
  if (s.cluster) at += 2 * row_tiles * 4 * (scatters(s) ? scatter_floats(s, slices) : exchange_words(s, slices));
  m.total = at;
  return m;
}
// Global memory of the exchange of family `grid`, for one group: [2][row tile] tagged words.
constexpr FUSED_RNN_HD int64_t grid_exchange_bytes(PersistentShape s, int slices, int row_tiles) {
  return int64_t{2} * row_tiles * exchange_words(s, slices) * 8;
}

}  // namespace fused_rnn::cuda
