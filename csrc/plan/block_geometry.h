// Geometry of family `block`, shared by its kernels (compile time) and the planner (run time). No CUDA include.
//
// One launch runs a layer over the whole sequence. A block owns all hidden units of one direction for some batch rows, so
// that blocks have nothing to tell each other. A warp owns all gates of some units over the whole of K: the lanes that hold
// the sums of an element also finish it, and no partial sum leaves a warp. Weights lie in registers, and in shared memory
// where registers do not suffice, as fragments of 16 rows by one chunk of K (persistent_geometry.h). The states (forward: h;
// backward: the gradients of the gates) lie in two buffers of shared memory, used in turn, so that a step has one barrier.
//   forward, several gates   a warp has 8 units; a fragment's 16 rows are 2 gates of these, the last one's upper half zeros
//                            where the gates are odd      M = 8 units x 2 gates, K = H
//   forward, one gate        a warp has 16 units          M = 16 units, K = H
//   backward                 a warp has 16 units          M = 16 units, K = G * H
// A lane has rows l / 4 and l / 4 + 8 of M and batch columns 2 (l % 4) and the next, as mma.sync leaves its sums. A block
// serves 8 batch rows, or 4: then every second column is empty, a lane has half of the elements, and twice as many blocks
// share the work.
#pragma once
#include "core/ceil_div.h"
#include "plan/math_kind.h"

namespace fused_rnn::cuda {

struct BlockShape {
  CellKind cell;
  MathKind math;
  bool backward;
  int columns;  // batch columns of a lane: 1 or 2
};

constexpr int kFragmentWords = 4 * 32;
constexpr int kBlockBatch = 4;  // chunks of K between two looks at their number

constexpr FUSED_RNN_HD int block_rows(BlockShape s) { return 4 * s.columns; }
constexpr FUSED_RNN_HD int block_chunk_step(MathKind math) { return storage_bytes(math) == 2 ? 16 : 8; }
constexpr FUSED_RNN_HD bool pairs_gates(BlockShape s) { return !s.backward && gate_count(s.cell) > 1; }
constexpr FUSED_RNN_HD int warp_units(BlockShape s) { return pairs_gates(s) ? 8 : 16; }
constexpr FUSED_RNN_HD int block_tiles(BlockShape s) { return pairs_gates(s) ? ceil_div(gate_count(s.cell), 2) : 1; }
// Warps of the largest block. With 16 warps a thread has 128 registers, with 8 it has 255.
constexpr FUSED_RNN_HD int max_block_warps(BlockShape s) { return s.backward && gate_count(s.cell) > 1 ? 8 : 16; }
constexpr FUSED_RNN_HD int max_block_units(BlockShape s) { return max_block_warps(s) * warp_units(s); }
constexpr FUSED_RNN_HD int block_warps(BlockShape s, int64_t H) { return static_cast<int>(ceil_div(H, warp_units(s))); }
// Chunks of K of one gate, and of all; units of warps beyond H are zeros.
constexpr FUSED_RNN_HD int chunks_of_gate(BlockShape s, int64_t H) {
  return ceil_div(block_warps(s, H) * warp_units(s), block_chunk_step(s.math));
}
constexpr FUSED_RNN_HD int block_chunks(BlockShape s, int64_t H) {
  return (s.backward ? gate_count(s.cell) : 1) * chunks_of_gate(s, H);
}
constexpr FUSED_RNN_HD int padded_chunks(BlockShape s, int64_t H) {
  return ceil_div(block_chunks(s, H), kBlockBatch) * kBlockBatch;
}
// Chunks whose weights lie in registers, 4 of a thread for a chunk and tile: as many as leave no spills (ptxas).
constexpr FUSED_RNN_HD int block_register_chunks(BlockShape s) {
  const int registers = max_block_warps(s) == 8 ? 128 : s.math == MathKind::kFp32 ? 32 : 64;
  return registers / 4 / block_tiles(s);
}
constexpr FUSED_RNN_HD int block_smem_chunks(BlockShape s, int64_t H) {
  const int chunks = block_chunks(s, H) - block_register_chunks(s);
  return chunks > 0 ? chunks : 0;
}
// Words of the states of one chunk: mma.sync takes 2 of a lane, multiply-adds take every element once.
constexpr FUSED_RNN_HD int block_chunk_words(BlockShape s) {
  return s.math == MathKind::kFp32 ? block_chunk_step(s.math) * block_rows(s) : 64;
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
  at += 8 * 4;
  m.biases = at;
  if (!s.backward) at += gate_count(s.cell) * max_block_units(s) * 4;
  m.states = at;
  at += 2 * padded_chunks(s, H) * block_chunk_words(s) * 4;
  m.weights = at;
  at += block_warps(s, H) * block_smem_chunks(s, H) * block_tiles(s) * kFragmentWords * 4;
  m.total = at;
  return m;
}

}  // namespace fused_rnn::cuda
