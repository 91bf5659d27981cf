// Geometry of family `block`, shared by its kernels (compile time) and the planner (run time). No CUDA include.
//
// One launch runs a layer over the whole sequence. A block owns all hidden units of one direction for 4 batch rows, so that
// blocks have nothing to tell each other. A warp owns all gates of 16 units over the whole of K: the lanes that hold the
// sums of an element also finish it, and no partial sum leaves a warp. Weights lie in registers, and in shared memory where
// registers do not suffice, as fragments of 16 rows by one chunk of K (persistent_geometry.h). The states (forward: h;
// backward: the gradients of the gates) lie in two buffers of shared memory, used in turn, so that a step has one barrier.
//   forward    a warp has a tile of M for each gate; K = H
//   backward   a warp has one tile of M; K = G * H
// mma.sync leaves rows l / 4 and l / 4 + 8 of a tile and columns 2 (l % 4) and the next to lane l. The two rows are
// neighbouring units, 2 (l / 4) of the warp's and the next, so that a lane reads and writes global memory in pairs (H is
// even). Batch row b is column 2 b, the other columns are empty: a lane then has one pair. The pointwise part of a step
// takes longer than its product, and twice as many blocks share it.
#pragma once
#include "core/ceil_div.h"
#include "plan/math_kind.h"

namespace fused_rnn::cuda {

struct BlockShape {
  CellKind cell;
  MathKind math;
  bool backward;
};

constexpr int kBlockRows = 4;
constexpr int kWarpUnits = 16;
constexpr int kFragmentWords = 4 * 32;
constexpr int kBlockBatch = 4;  // chunks of K between two looks at their number

constexpr FUSED_RNN_HD int block_chunk_step(MathKind math) { return storage_bytes(math) == 2 ? 16 : 8; }
constexpr FUSED_RNN_HD int block_tiles(BlockShape s) { return s.backward ? 1 : gate_count(s.cell); }
// Warps of the largest block. With 16 warps a thread has 128 registers, with 8 it has 255.
constexpr FUSED_RNN_HD int max_block_warps(BlockShape s) { return gate_count(s.cell) > 1 ? 8 : 16; }
constexpr FUSED_RNN_HD int max_block_units(BlockShape s) { return max_block_warps(s) * kWarpUnits; }
constexpr FUSED_RNN_HD int block_warps(int64_t H) { return static_cast<int>(ceil_div(H, kWarpUnits)); }
// Chunks of K of one gate, and of all; units of warps beyond H are zeros.
constexpr FUSED_RNN_HD int chunks_of_gate(BlockShape s, int64_t H) {
  return ceil_div(block_warps(H) * kWarpUnits, block_chunk_step(s.math));
}
constexpr FUSED_RNN_HD int block_chunks(BlockShape s, int64_t H) {
  return (s.backward ? gate_count(s.cell) : 1) * chunks_of_gate(s, H);
}
constexpr FUSED_RNN_HD int padded_chunks(BlockShape s, int64_t H) {
  return ceil_div(block_chunks(s, H), kBlockBatch) * kBlockBatch;
}
// Chunks whose weights lie in registers, 4 of a thread for a chunk and tile: as many as leave no spills (ptxas).
constexpr FUSED_RNN_HD int block_register_chunks(BlockShape s) {
  const int registers = max_block_warps(s) == 8 ? 128 : 64;
  const int most = padded_chunks(s, max_block_units(s)), chunks = registers / 4 / block_tiles(s) / kBlockBatch * kBlockBatch;
  return chunks < most ? chunks : most;
}
constexpr FUSED_RNN_HD int block_smem_chunks(BlockShape s, int64_t H) {
  const int chunks = block_chunks(s, H) - block_register_chunks(s);
  return chunks > 0 ? chunks : 0;
}
// Words of the states of one chunk: mma.sync takes 2 of a lane, multiply-adds take every element once.
constexpr FUSED_RNN_HD int block_chunk_words(BlockShape s) {
  return s.math == MathKind::kFp32 ? block_chunk_step(s.math) * kBlockRows : 64;
}

// Dynamic shared memory, in this order, each part a multiple of 16 bytes.
struct BlockSmem {
  int lengths;  // [row]: number of active steps, 32 bits
  int biases;   // forward: [gate][unit of the largest block] floats, b_hh
  int states;   // [2][padded chunk] words of a chunk
  int weights;  // [warp][chunk beyond the registers][tile][lane][4] words
  int total;
};
constexpr FUSED_RNN_HD BlockSmem block_smem(BlockShape s, int64_t H) {
  BlockSmem m{};
  int at = 0;
  m.lengths = at;
  at += kBlockRows * 4;
  m.biases = at;
  if (!s.backward) at += gate_count(s.cell) * max_block_units(s) * 4;
  m.states = at;
  at += 2 * padded_chunks(s, H) * block_chunk_words(s) * 4;
  m.weights = at;
  at += block_warps(H) * block_smem_chunks(s, H) * block_tiles(s) * kFragmentWords * 4;
  m.total = at;
  return m;
}

}  // namespace fused_rnn::cuda
