// How the blocks of a persistent family, `cluster` or `grid`, share the units of a formula's layer and what a block's shared
// memory holds: made by the planner (plan/formula_persistent.cpp), read by the kernels (formula_persistent.cuh in
// cuda/formula). No CUDA include.
//
// A team is the blocks that own kFormulaPersistentRows batch rows of one group of units in one direction: a cluster, or in
// family `grid` blocks of a launch that run at the same time. A group is all units, or one head where nothing in the step
// goes across heads. The units of a head are padded to whole chunks of K (kChunkBytes, at least 16 units), so that 16 units,
// an atom, belong to one head. Block `rank` of a team owns the padded units rank * slice, rank * slice + 1, ...
#pragma once
#include "core/formula.h"

namespace fused_rnn::cuda {

constexpr int kFormulaPersistentRows = 8, kFormulaPersistentThreads = 256, kFormulaPersistentAtom = 16;

// Offsets are bytes of shared memory, aligned to 128.
struct FormulaPersistentShape {
  int ranks;            // blocks of a team; 1: nothing is exchanged, and no instruction for clusters is reached
  int groups;           // of units
  int heads;            // of a group
  int head;             // padded units of a head
  int units;            // padded units of a group
  int slice;            // padded units of a block, whole atoms; the last block may have fewer, but has some
  int recurrent_local;  // every block has whole heads: the recurrent product reads the block's own units alone
  int exchanges;        // of a step between all blocks: of what the recurrent product reads, and one for each level
  int copy_vectors;     // rows of all weights are whole pieces of 16 bytes, aligned
  int splits[kMostFormulaPhases + 1];  // parts of K of the recurrent product, and of the products of each level
  int barriers, table, constants, staged, arrays, moments, sums;
  int weights[kMostFormulaPhases + 1];  // of the recurrent product, and of each phase
  int own_vector;                       // recurrent_local: what the recurrent product reads
  // Vectors and norms of exchanges: those of even number at the begin, those of odd number at the end. Each holds whole
  // vectors, or moments of all blocks, so that a block's own part never lies where another block's part lay.
  int vectors, vectors_bytes, norms, norms_bytes;
  int smem_bytes;
};

// Bytes of a block's shared memory for exchanges, vectors and norms.
constexpr FUSED_RNN_HD int formula_exchange_bytes(const FormulaPersistentShape& s) {
  return s.norms + s.norms_bytes - s.vectors;
}

// The teams of a launch, of all of the layer: [direction][group][row tile].
struct FormulaTeams {
  int row_tiles;  // of a group and direction
  int first;      // of this launch
  void* words;    // family grid: of each team of the layer 2 * formula_exchange_bytes, zero before the launch
};

}  // namespace fused_rnn::cuda
