// The tables of one instruction set, from its two vector types. To be included inside the target region, if there is one.
#pragma once
#include "cpu/isa/content_hash.h"
#include "cpu/isa/pointwise.h"
#include "cpu/isa/pointwise_dual.h"
#include "cpu/isa/pointwise_modified.h"
#include "cpu/isa/random_flags.h"
#include "cpu/isa/tile.h"
#include "cpu/isa/transpose.h"

namespace fused_rnn::cpu {

template <class V>
Kernels<typename V::Scalar> make_kernels() {
  Kernels<typename V::Scalar> table{};
  table.width = V::kWidth;
  for (int v = 0; v <= kMaxTileVectors; ++v) table.max_rows[v] = V::kMaxRows[v];
  for (int n = 0; n <= 2; ++n) table.max_panels[n] = V::kMaxPanels[n];
  table.halves = V::kHalves;
  table.gemm = gemm<V>;
  table.hash = content_hash<V>;
  table.transpose = transpose<V>;
  table.flags = random_flags<V>;
  fill_dual<V>(table);
  if constexpr (sizeof(typename V::Scalar) == 8) {
    fill_storage<V, double>(table, 0);
    fill_modified<V, double>(table, 0);
  } else {
    fill_storage<V, float>(table, 0);
    fill_modified<V, float>(table, 0);
    fill_storage<V, Half>(table, 1);
    fill_modified<V, Half>(table, 1);
    fill_storage<V, BFloat16>(table, 2);
    fill_modified<V, BFloat16>(table, 2);
  }
  return table;
}

}  // namespace fused_rnn::cpu
