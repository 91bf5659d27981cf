#include "cpu/gemm/matrix.h"

#include <cstring>
#include <memory>
#include <new>

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kDeep = 16;  // k that are packed at a time: a cache line of floats, so that both sides stay in L1

template <class A>
void pack_transposed(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last) {
  const Shape& s = m.shape;
  const int64_t element_size = dtype_size(m.source.storage);
  const auto load = kernels.load[storage_index(m.source.storage)];
  const bool converts = element_size != static_cast<int64_t>(sizeof(A));
  A converted[kMaxVectorBytes / sizeof(A) * kDeep];
  for (int64_t p = first; p < last; ++p) {
    const int vectors = s.vectors_of(p);
    const int64_t first_vector = s.columns_before(p) / s.width, step = kernels.together(vectors) * s.width;
    for (int64_t k = 0; k < s.depth; k += kDeep) {
      const int64_t deep = std::min(kDeep, s.depth - k);
      A* const panel = m.packed_panel(p) + k * step;
      for (int v = 0; v < vectors; ++v) {
        const auto [gate, unit, lanes] = vector_of(s, first_vector + v);
        const void* const rows = stored_at(m.source.data, (gate * s.units + unit) * s.depth + k, element_size);
        const int64_t column = v * s.width;
        A* const to = panel + column / step * step * s.depth + column % step;
        if (converts) {
          for (int lane = 0; lane < lanes; ++lane)
            load(stored_at(rows, lane * s.depth, element_size), converted + lane * kDeep, deep);
          kernels.transpose({converted, kDeep, lanes, deep, to, step});
        } else {
          kernels.transpose({static_cast<const A*>(rows), s.depth, lanes, deep, to, step});
        }
        for (int lane = lanes; lane < s.width; ++lane) {
          for (int64_t i = 0; i < deep; ++i) to[i * step + lane] = 0;
        }
      }
    }
  }
}

// Some rows of the source at a time, for all panels, so that memory is read in its order.
template <class A>
void pack_straight(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last) {
  const Shape& s = m.shape;
  const int64_t element_size = dtype_size(m.source.storage);
  const auto load = kernels.load[storage_index(m.source.storage)];
  for (int64_t begin = 0; begin < s.depth; begin += kDeep) {
    const int64_t end = std::min(begin + kDeep, s.depth);
    for (int64_t p = first; p < last; ++p) {
      const int64_t step = kernels.together(s.vectors_of(p)) * s.width, panel_end = s.columns_before(p + 1);
      for (int64_t start = s.columns_before(p); start < panel_end; start += step) {
        const int64_t columns = std::clamp<int64_t>(s.units - start, 0, step);
        A* const to = m.packed + start * s.depth;
        for (int64_t k = begin; k < end; ++k) {
          load(stored_at(m.source.data, k * s.units + start, element_size), to + k * step, columns);
          for (int64_t i = columns; i < step; ++i) to[k * step + i] = 0;
        }
      }
    }
  }
}

// Calls f with the elements of a matrix in their type, one of those that A is the arithmetic type of.
template <class A, class F>
void with_elements(const WeightMatrix& from, F&& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<const double*>(from.data));
  } else {
    switch (from.storage) {
      case DType::kFloat16: return f(static_cast<const Half*>(from.data));
      case DType::kBFloat16: return f(static_cast<const BFloat16*>(from.data));
      case DType::kFloat64: return;  // its arithmetic type is double
      case DType::kFloat32: return f(static_cast<const float*>(from.data));
    }
  }
}

void pack_parts(const PartsKernels& kernels, const Matrix<float>& m, int64_t first, int64_t last) {
  const Shape& s = m.shape;
  const int64_t tile = m.parts.panels * kPartsTile, element_size = dtype_size(m.source.storage);
  const auto pack = (m.straight ? kernels.pack_straight : kernels.pack_transposed)[storage_index(m.source.storage)];
  for (int64_t p = first; p < last; ++p) {
    const int vectors = s.vectors_of(p);
    const int64_t first_vector = s.columns_before(p) / s.width;
    uint16_t* panel = m.tiles + first_vector * m.vector_elements();
    for (int v = 0; v < vectors; ++v) {
      const auto [gate, unit, lanes] = vector_of(s, first_vector + v);
      const int64_t begin = m.straight ? unit : (gate * s.units + unit) * s.depth;
      const PartsSource source{stored_at(m.source.data, begin, element_size), m.straight ? s.units : s.depth, lanes,
                               s.depth};
      if (!pack(source, m.parts.panels, panel + v * tile, vectors * tile))
        m.infinite->store(true, std::memory_order_relaxed);
    }
  }
}

template <class A>
void pack_panels(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last) {
  switch (m.form) {
    case Form::kDirect:
    case Form::kDirectParts: return;
    case Form::kPacked:
      return m.straight ? pack_straight(kernels, m, first, last) : pack_transposed(kernels, m, first, last);
    case Form::kParts:
      if constexpr (sizeof(A) == sizeof(float)) pack_parts(*kernels.parts, m, first, last);
  }
}

template <class A>
uint64_t source_hash(const Kernels<A>& kernels, const Matrix<A>& m, int64_t panel) {
  const PanelSource source = source_of(m, panel);
  uint64_t hash = 0;
  for (int gate = 0; gate < m.shape.gates; ++gate)
    hash = kernels.hash(hash_keys(), source.of_gate(gate), source.bytes_of_gate, hash);
  return hash;
}

// Packs panels of a cached matrix. Both a panel and its hash are made from one copy of the source, so that a panel never
// lies beside the hash of other weights, not even where another thread changes the weights meanwhile.
template <class A>
class CachedPanelPacker {
 public:
  CachedPanelPacker(const Kernels<A>& kernels, const Matrix<A>& m) : kernels_(kernels), m_(m) {}

  void pack(int64_t panel) {
    std::atomic<bool> infinite{false};
    CachedPanel& cached = m_.cached->panels[panel];
    cached.valid = false;
    Matrix<A> one = m_;
    one.infinite = &infinite;
    const PanelSource source = source_of(m_, panel);
    const int64_t gate_bytes = source.bytes_of_gate, bytes = m_.shape.gates * gate_bytes;
    if (!reserve(bytes)) {  // packed from the source itself, for this call alone
      pack_panels(kernels_, one, panel, panel + 1);
      cached.infinite = infinite.load();
      return;
    }
    for (int gate = 0; gate < m_.shape.gates; ++gate)
      std::memcpy(copy_.get() + gate * gate_bytes, source.of_gate(gate), static_cast<size_t>(gate_bytes));
    const int64_t columns = m_.shape.columns_before(panel);
    one.shape = Shape(m_.shape.depth, source.units, m_.shape.gates, m_.shape.width);
    one.source.data = copy_.get();
    one.cached = nullptr;
    if (m_.form == Form::kPacked) one.packed += columns * m_.shape.depth;
    if (m_.form == Form::kParts) one.tiles += columns / m_.shape.width * m_.vector_elements();
    pack_panels(kernels_, one, 0, 1);
    cached = {source_hash(kernels_, one, 0), true, infinite.load()};
  }

 private:
  // No exception leaves a parallel region.
  bool reserve(int64_t bytes) {
    if (bytes > size_) copy_.reset(new (std::nothrow) char[static_cast<size_t>(bytes)]);
    if (bytes > size_) size_ = copy_ ? bytes : 0;
    return copy_ != nullptr;
  }

  const Kernels<A>& kernels_;
  const Matrix<A>& m_;
  std::unique_ptr<char[]> copy_;
  int64_t size_ = 0;
};

}  // namespace

template <class A>
void pack(const Kernels<A>& kernels, const Matrix<A>& m, int64_t first, int64_t last) {
  if (!m.cached) {
    pack_panels(kernels, m, first, last);
    return;
  }
  CachedPanelPacker<A> packer(kernels, m);
  int64_t packed = 0;
  for (int64_t p = first; p < last; ++p) {
    const CachedPanel& cached = m.cached->panels[p];
    if (!cached.valid || cached.hash != source_hash(kernels, m, p)) {
      packer.pack(p);
      ++packed;
    }
    if (cached.infinite) m.infinite->store(true, std::memory_order_relaxed);
  }
  count_cached_panels(last - first - packed, packed);
}

template <class A>
void pack_passing(const Kernels<A>& kernels, const Matrix<A>& m, int64_t panel, A* room) {
  Matrix<A> in_room = m;
  in_room.packed = room;
  pack_panels(kernels, in_room, panel, panel + 1);
}

template <class A>
void multiply_infinite(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const A* row, int64_t panel, A* out) {
  const Shape& s = m.shape;
  const int64_t start = s.columns_before(panel), columns = s.columns_before(panel + 1) - start;
  if (!m.straight) {
    kernels.direct[storage_index(m.source.storage)]({s.depth, &row, 1, m.source.data, s.units, s.gates, start / s.width,
                                                     (start + columns) / s.width, init ? init + start : nullptr, out, 0});
    return;
  }
  for (int64_t c = 0; c < columns; ++c) out[c] = init ? init[start + c] : A(0);
  with_elements<A>(m.source, [&](auto* elements) {
    const int64_t exist = std::min(columns, s.units - start);
    for (int64_t k = 0; k < s.depth; ++k) {
      for (int64_t c = 0; c < exist; ++c) out[c] += row[k] * to_arithmetic(elements[k * s.units + start + c]);
    }
  });
}

template void pack(const Kernels<float>&, const Matrix<float>&, int64_t, int64_t);
template void pack(const Kernels<double>&, const Matrix<double>&, int64_t, int64_t);
template void pack_passing(const Kernels<float>&, const Matrix<float>&, int64_t, float*);
template void pack_passing(const Kernels<double>&, const Matrix<double>&, int64_t, double*);
template void multiply_infinite(const Kernels<float>&, const Matrix<float>&, const float*, const float*, int64_t, float*);
template void multiply_infinite(const Kernels<double>&, const Matrix<double>&, const double*, const double*, int64_t,
                                double*);

}  // namespace fused_rnn::cpu
