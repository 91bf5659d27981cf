// A matrix of weights in the form that the products of a call read.
#pragma once
#include <atomic>
#include <cstddef>

#include "cpu/gemm/shape.h"
#include "cpu/gemm/weight_cache.h"
#include "cpu/isa/kernels.h"
#include "cpu/matrix_form.h"

namespace fused_rnn::cpu {

// When the panels of a packed matrix are packed.
enum class Packing {
  kBefore,   // before the call's products, by pack_share
  kLate,     // each before the products that read it
  kPassing,  // likewise, into a room of the thread that multiplies, for this call alone
};

// The rows of a product have `depth` elements. `source` is torch's matrix: [gates, units, K] (its rows become columns of the
// panels), or, where the matrix is `straight`, [K, units].
template <class A>
struct Matrix {
  Shape shape;
  Form form = Form::kDirect;
  bool straight = false;
  WeightMatrix source{nullptr, DType::kFloat32};
  A* packed = nullptr;        // Form::kPacked
  uint16_t* tiles = nullptr;  // Form::kParts
  Parts parts;
  std::atomic<bool>* infinite = nullptr;  // Form::kParts: set where an element has no parts
  CachedMatrix* cached = nullptr;         // what owns `packed` or `tiles`; null: the workspace of the call
  bool far = false;                       // `packed` or `tiles` come from beyond L2: products ask for panels ahead
  Packing packing = Packing::kBefore;

  bool passes() const { return packing == Packing::kPassing; }
  int64_t packed_elements() const { return form == Form::kPacked && !passes() ? shape.elements() : 0; }
  int64_t room_elements() const { return passes() ? shape.vectors * shape.width * shape.depth : 0; }
  A* packed_panel(int64_t panel) const { return passes() ? packed : packed + shape.columns_before(panel) * shape.depth; }
  // Of one vector of columns, of the whole matrix, and of a block of 16 rows that it is multiplied with.
  int64_t vector_elements() const { return depth_blocks(shape.depth) * parts.panels * kPartsTile; }
  int64_t tile_elements() const { return form == Form::kParts ? shape.columns() / shape.width * vector_elements() : 0; }
  int64_t row_block_elements() const { return depth_blocks(shape.depth) * parts.rows * kPartsTile; }
  int64_t bytes() const {  // of `packed` or `tiles`
    return packed_elements() * static_cast<int64_t>(sizeof(A)) + tile_elements() * static_cast<int64_t>(sizeof(uint16_t));
  }
  const uint16_t* tiles_of(int64_t panel) const {
    return tiles + shape.columns_before(panel) / shape.width * vector_elements();
  }
  // For ThreadPlanInput: bytes of an element as products read it, and the pairs of parts that they multiply.
  int64_t element_size() const { return form == Form::kParts ? parts.panels * int64_t{2} : int64_t{sizeof(A)}; }
  int part_pairs() const { return form == Form::kParts || form == Form::kDirectParts ? pairs_of_parts(parts) : 0; }
};

// What a panel of a transposed matrix is packed from: for each gate neighbouring rows of the source.
struct PanelSource {
  const char* rows;       // of the first gate
  int64_t gate_stride;    // bytes from gate to gate
  int64_t bytes_of_gate;  // that belong to the panel
  int64_t units;
  const char* of_gate(int gate) const { return rows + gate * gate_stride; }
};
template <class A>
PanelSource source_of(const Matrix<A>& m, int64_t panel) {
  const Shape& s = m.shape;
  const int64_t row_bytes = s.depth * dtype_size(m.source.storage);
  const int64_t unit = s.unit_vector(panel) * s.width, vectors = s.vectors_of(panel) / s.gates;
  const int64_t units = std::min(vectors * s.width, s.units - unit);
  return {static_cast<const char*>(m.source.data) + unit * row_bytes, s.units * row_bytes, units * row_bytes, units};
}

// Fills panels [first, last) of a packed matrix, or of one in parts, from its source. Of a cached matrix only the panels
// whose source has changed.
template <class A>
void pack(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last);

// A panel of a matrix that passes, from its source, to `room` (room_elements()).
template <class A>
void pack_passing(const Kernels<A>& kernels, const Matrix<A>& m, int64_t panel, A* room);

// Columns of a panel for one row, from the source: what a matrix in parts falls back to where the row or the matrix has a
// value without parts (infinite, NaN, or rounded to infinity).
template <class A>
void multiply_infinite(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* row, int64_t panel, A* out);

// n rows with some panels of a matrix: init[c] + sum_k rows[r][k] m[k][c]
template <class A>
struct Product {
  const Kernels<A>& kernels;
  const Matrix<A>& matrix;
  const A* init;         // [columns], or null (zeros)
  const A* const* rows;  // [n] pointers to [K]
  int64_t n;
  Panels panels;
  // Where the matrix is in parts, the rows may be stored in another type: then here, and not in `rows`.
  const void* const* stored = nullptr;  // [n] pointers to [K] storage
  int storage = 0;                      // its storage_index
};

// A part of a product, the rows [row, row + rows) of the panels [first, last), and where its sums lie.
template <class A>
struct Tile {
  int64_t row;
  int rows;
  int64_t first, last;
  A* sums;
  int64_t stride;  // from row to row
};

}  // namespace fused_rnn::cpu
