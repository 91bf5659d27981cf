// An instruction set in plain C++ with what AVX-512 and AMX have: 16 floats in a vector, and products in bfloat16 parts
// (csrc/cpu/isa/parts.h) for every storage type. With it the layout and the loops of such products run, under sanitizers, on
// machines that lack the instructions.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm/matrix.h"
#include "cpu/isa/kernel_table.h"
#include "harness.h"

namespace fused_rnn::cpu {
namespace parts {

template <class A>
struct Vec : simd::VectorBase {
  using Scalar = A;
  static constexpr int kWidth = 64 / sizeof(A);
  static constexpr int kMostSums = 24, kDirectRows = 4;
  static constexpr bool kHalves = false;
  static constexpr int kMaxRows[kMaxTileVectors + 1] = {0, 8, 8, 8, 6};
  static constexpr int kMaxPanels[3] = {0, 4, 2};
  static constexpr int kInStep = 4;
  using Square = void;
  static constexpr bool kShort = false;
  A lanes[kWidth];

  Vec() {}
  explicit Vec(A value) { std::fill_n(lanes, kWidth, value); }
  template <class F>
  static Vec of(F&& f) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.lanes[i] = f(i);
    return result;
  }
  static Vec broadcast(const A* p) { return Vec(*p); }
  static Vec load_pinned(const A* p) { return load_partial(p, kWidth); }
  template <class Storage>
  static Vec load(const Storage* p) {
    return load_partial(p, kWidth);
  }
  template <class Storage>
  static Vec load_partial(const Storage* p, int n) {
    return of([&](int i) { return i < n ? to_arithmetic(p[i]) : A(0); });
  }
  template <class Storage>
  void store(Storage* p) const {
    store_partial(p, kWidth);
  }
  template <class Storage>
  void store_partial(Storage* p, int n) const {
    for (int i = 0; i < n; ++i) store_converted(lanes[i], p + i);
  }
  friend Vec operator+(const Vec& a, const Vec& b) {
    return of([&](int i) { return a.lanes[i] + b.lanes[i]; });
  }
  friend Vec operator-(const Vec& a, const Vec& b) {
    return of([&](int i) { return a.lanes[i] - b.lanes[i]; });
  }
  friend Vec operator*(const Vec& a, const Vec& b) {
    return of([&](int i) { return a.lanes[i] * b.lanes[i]; });
  }
  friend Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    return of([&](int i) { return a.lanes[i] * b.lanes[i] + c.lanes[i]; });
  }
  friend Vec select_less(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
    return of([&](int i) { return a.lanes[i] < b.lanes[i] ? x.lanes[i] : y.lanes[i]; });
  }
  friend Vec clamp(const Vec& x, const Vec& low, const Vec& high) {
    return select_less(high, x, high, select_less(x, low, low, x));
  }
  friend Vec round_to_integer(const Vec& x) {
    return of([&](int i) { return std::nearbyint(x.lanes[i]); });
  }
  friend Vec power_of_two(const Vec& n) {
    return of([&](int i) { return std::exp2(n.lanes[i]); });
  }
  friend Vec reciprocal(const Vec& x) {
    return of([&](int i) { return A(1) / x.lanes[i]; });
  }
  friend Vec divide(const Vec& n, const Vec& d) {
    return of([&](int i) { return n.lanes[i] / d.lanes[i]; });
  }
};

// Takes the part off a value; false where it has none.
bool take_part(float& value, uint16_t& part) {
  BFloat16 rounded;
  store_converted(value, &rounded);
  part = rounded.bits;
  const float back = to_arithmetic(rounded);
  value -= back;
  return std::isfinite(back);
}

float part_value(uint16_t bits) { return to_arithmetic(BFloat16{bits}); }

// Writes all parts of a value, part by part one tile further.
bool write_parts(float value, int parts, uint16_t* at) {
  bool finite = true;
  for (int part = 0; part < parts; ++part) finite &= take_part(value, at[part * kPartsTile]);
  return finite;
}

template <class Storage>
uint32_t pack_rows(const void* const* rows, int n_rows, int64_t depth, int parts, uint16_t* out) {
  uint32_t infinite = 0;
  for (int64_t block = 0; block < depth_blocks(depth); ++block, out += parts * kPartsTile) {
    for (int r = 0; r < n_rows; ++r) {
      for (int i = 0; i < kPartsDepth; ++i) {
        const int64_t k = block * kPartsDepth + i;
        const float value = k < depth ? to_arithmetic(static_cast<const Storage*>(rows[r])[k]) : 0.0f;
        const bool finite = write_parts(value, parts, out + r * kPartsDepth + i);
        if (!finite) infinite |= 1u << r;
      }
    }
  }
  return infinite;
}

template <class Storage>
float value_at(const PartsSource& source, int64_t lane, int64_t k, bool lanes_are_rows) {
  if (lane >= source.lanes || k >= source.depth) return 0;
  return to_arithmetic(
      static_cast<const Storage*>(source.from)[lanes_are_rows ? lane * source.stride + k : k * source.stride + lane]);
}

// A panel's vector.
template <class Storage, bool kTransposed>
bool pack_vector(const PartsSource& source, int parts, uint16_t* out, int64_t stride) {
  bool finite = true;
  for (int64_t block = 0; block < depth_blocks(source.depth); ++block, out += stride) {
    for (int i = 0; i < kPartsDepth; ++i) {
      for (int lane = 0; lane < kPartsColumns; ++lane) {
        const float value = value_at<Storage>(source, lane, block * kPartsDepth + i, kTransposed);
        finite &= write_parts(value, parts, out + i / 2 * 2 * kPartsColumns + lane * 2 + i % 2);
      }
    }
  }
  return finite;
}

template <class Storage>
bool pack_block(const PartsSource& source, int parts, uint16_t* tile, int quarter) {
  bool finite = true;
  for (int lane = 4 * quarter; lane < 4 * quarter + 4; ++lane) {
    for (int i = 0; i < kPartsDepth; ++i) {
      finite &= write_parts(value_at<Storage>(source, lane, i, true), parts, tile + lane * kPartsDepth + i);
    }
  }
  return finite;
}
template <class Storage>
bool pack_columns(const PartsSource& source, int parts, uint16_t* tile, int quarter) {
  bool finite = true;
  for (int lane = 0; lane < kPartsRows; ++lane) {
    for (int i = 8 * quarter; i < 8 * quarter + 8; ++i) {
      finite &= write_parts(value_at<Storage>(source, lane, i, false), parts, tile + lane * kPartsDepth + i);
    }
  }
  return finite;
}

void gemm(const PartsCall& call) {
  const int64_t blocks = depth_blocks(call.depth);
  for (int r = 0; r < call.n_rows; ++r) {
    for (int c = 0; c < call.vectors * kPartsColumns; ++c) {
      float& out = call.out[r * call.out_stride + c];
      if (!call.add) out = call.init ? call.init[c] : 0.0f;
    }
  }
  const uint16_t* panel = call.panel;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int r = 0; r < call.n_rows; ++r) {
      const uint16_t* rows = call.rows + (r / kPartsRows * blocks + block) * call.parts.rows * kPartsTile;
      for (int v = 0; v < call.vectors; ++v) {
        for (int c = 0; c < kPartsColumns; ++c) {
          float sum = 0;
          for (int i = 0; i < call.parts.rows; ++i) {
            for (int j = 0; j < call.parts.panels && i + j < std::max(call.parts.rows, 1); ++j) {
              const uint16_t* row = rows + i * kPartsTile + r % kPartsRows * kPartsDepth;
              const uint16_t* column = panel + (v * call.parts.panels + j) * kPartsTile + 2 * c;
              for (int k = 0; k < kPartsDepth; ++k) {
                sum += part_value(row[k]) * part_value(column[k / 2 * 2 * kPartsColumns + k % 2]);
              }
            }
          }
          call.out[r * call.out_stride + v * kPartsColumns + c] += sum;
        }
      }
    }
    panel += call.vectors * call.parts.panels * kPartsTile;
    if (call.background.run) call.background.run(call.background.context, block, blocks);
  }
}

template <class Storage>
bool direct(const DirectPartsCall& call) {
  bool finite = true;
  const int64_t padded = depth_blocks(call.depth) * kPartsDepth;
  std::vector<float> weights(static_cast<size_t>(padded * call.parts.panels));  // [K][parts] of a unit
  for (int v = 0; v < call.vectors; ++v) {
    for (int unit = 0; unit < kPartsColumns; ++unit) {
      std::fill(weights.begin(), weights.end(), 0.0f);
      for (int64_t k = 0; k < call.depth && unit < call.lanes[v]; ++k) {
        float value = to_arithmetic(static_cast<const Storage*>(call.weights[v])[unit * call.depth + k]);
        for (int j = 0; j < call.parts.panels; ++j) {
          uint16_t bits = 0;
          finite &= take_part(value, bits);
          weights[k * call.parts.panels + j] = part_value(bits);
        }
      }
      for (int r = 0; r < call.n_rows; ++r) {
        float sum = call.init ? call.init[v * kPartsColumns + unit] : 0.0f;
        const uint16_t* rows = call.rows + r / kPartsRows * call.block_elements + r % kPartsRows * 2;
        for (int64_t k = 0; k < padded; ++k) {
          const int64_t tile = k / kPartsDepth * call.parts.rows, at = k % kPartsDepth;
          for (int i = 0; i < call.parts.rows; ++i) {
            const float row = part_value(rows[(tile + i) * kPartsTile + at / 2 * 2 * kPartsColumns + at % 2]);
            for (int j = 0; j < call.parts.panels && i + j < call.parts.rows; ++j)
              sum += row * weights[k * call.parts.panels + j];
          }
        }
        call.out[r * call.out_stride + v * kPartsColumns + unit] = sum;
      }
    }
  }
  return finite;
}

template <class Storage>
void add_storage(PartsKernels& kernels, int storage) {
  kernels.gains[storage] = true;
  kernels.direct[storage] = direct<Storage>;
  kernels.pack_rows[storage] = pack_rows<Storage>;
  kernels.pack_transposed[storage] = pack_vector<Storage, true>;
  kernels.pack_straight[storage] = pack_vector<Storage, false>;
  kernels.pack_block[storage] = pack_block<Storage>;
  kernels.pack_columns[storage] = pack_columns<Storage>;
}

}  // namespace parts

const InstructionSet* parts_kernels() {
  static const PartsKernels parts = [] {
    PartsKernels table;
    table.reads_once = true;
    table.rate = 16;
    parts::add_storage<float>(table, 0);
    parts::add_storage<Half>(table, 1);
    parts::add_storage<BFloat16>(table, 2);
    table.gemm = parts::gemm;
    table.release = [] {};
    return table;
  }();
  static const Kernels<float> f32 = [] {
    Kernels<float> table = make_kernels<parts::Vec<float>>();
    table.parts = &parts;
    return table;
  }();
  static const Kernels<double> f64 = make_kernels<parts::Vec<double>>();
  static const InstructionSet set{"parts", f32, f64};
  return &set;
}

}  // namespace fused_rnn::cpu
