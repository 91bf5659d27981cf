// How fast the calling thread is at what a scan is made of, measured now on arrays in its cache. The benchmark's floors are
// made of these rates. Each measurement takes some milliseconds.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace fused_rnn::cpu {

// Floating-point operations a second (a multiply-add is two) of the instruction set's product of a tile, whose operands are
// in the nearest cache. 16-bit dtypes that the vectors compute in float have float's rate.
double product_rate(DType dtype);

// Bytes a second of panels of floats that a product with one row reads, of which there are `bytes` in all: the rate of the
// cache that holds so many, or of memory.
double read_rate(int64_t bytes);

// Seconds of the pointwise half of one step of `rows` rows of H units: of forward, with what training saves or without it,
// or of backward.
enum class Pointwise { kInference, kTraining, kBackward };
double pointwise_seconds(CellKind cell, DType dtype, Pointwise pass, int rows, int64_t H);

}  // namespace fused_rnn::cpu
