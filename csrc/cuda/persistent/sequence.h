// The arguments of the kernels of families `grid`, `cluster` and `block`, and where to find a kernel of the first two.
// Geometry: plan/persistent_geometry.h and plan/block_geometry.h.
#pragma once
#include "plan/persistent_geometry.h"

namespace fused_rnn::cuda {

// What a launch covers; blocks are numbered [direction][group][slice]. The launch makes `steps` steps of the scan (backward:
// of the backward scan) from first_step on. A launch that begins after step 0 starts from what the launch of the steps
// before left in h_n and `carry`. A launch that ends before the last step leaves the same.
struct PersistentLaunch {
  int slices;     // blocks of a group
  int groups;     // of each direction in this launch
  int row_tiles;  // of 8 batch rows, of a group
  int first_dir;
  int64_t first_row;
  int64_t first_step, steps;
  float* carry;    // forward: [D, B, H] c; backward: [2, D, B, H] gradients of h and of c; null where nothing is carried
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

// One specialisation per kind of arithmetic and family, in grid_*.cu and cluster_*.cu. cell: any cell (kernel_cell.h says
// which share a kernel).
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

// Fills memory with zeros before a launch of family `grid`.
struct ZeroFill {
  void* memory;    // aligned to 16 bytes
  int64_t pieces;  // of 16 bytes
};

}  // namespace fused_rnn::cuda
