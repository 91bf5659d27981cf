#include "cpu/rates.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/isa/kernels.h"
#include "cpu/matrix_form.h"

namespace fused_rnn::cpu {
namespace {

// Arrays are made of these sizes.
void check_size(const char* name, int64_t size, int64_t most) {
  if (size < 1 || size > most) {
    throw std::invalid_argument(std::string(name) + ": expected 1 to " + std::to_string(most) + ", got " +
                                std::to_string(size));
  }
}

// The least seconds of one call of f, over samples of at least 50 us.
template <class F>
double least_seconds(F&& f) {
  using Clock = std::chrono::steady_clock;
  constexpr int kSamples = 40;
  const auto seconds_of = [&](int64_t calls) {
    const Clock::time_point start = Clock::now();
    for (int64_t i = 0; i < calls; ++i) f();
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  int64_t calls = 1;
  while (seconds_of(calls) < 50e-6) calls *= 2;
  double least = std::numeric_limits<double>::infinity();
  for (int sample = 0; sample < kSamples; ++sample) least = std::min(least, seconds_of(calls) / static_cast<double>(calls));
  return least;
}

// Zeroed memory with the arrays that layout(Arena&) takes: called once to count, once to place.
template <class Layout>
std::unique_ptr<char[]> laid_out(Layout&& layout) {
  Arena counting(nullptr);
  layout(counting);
  std::unique_ptr<char[]> memory(new char[static_cast<size_t>(counting.used() + 64)]());
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  Arena placing(memory.get() + (64 - address % 64) % 64);
  layout(placing);
  return memory;
}

// The product of the most rows and vectors that one tile has, deep enough for its ends not to count.
template <class A>
double tile_rate(const Kernels<A>& kernels) {
  constexpr int64_t kDepth = 128;
  int vectors = 1;
  for (int v = 2; v <= kMaxTileVectors; ++v) {
    if (kernels.max_rows[v] * v > kernels.max_rows[vectors] * vectors) vectors = v;
  }
  const int n_rows = kernels.max_rows[vectors];
  const int64_t columns = vectors * kernels.width;
  A *rows = nullptr, *panel = nullptr, *out = nullptr;
  const auto memory = laid_out([&](Arena& arena) {
    rows = arena.take<A>(n_rows * kDepth);
    panel = arena.take<A>(kDepth * columns);
    out = arena.take<A>(n_rows * columns);
  });
  std::vector<const A*> pointers;
  for (int r = 0; r < n_rows; ++r) pointers.push_back(rows + r * kDepth);
  GemmCall<A> call{};
  call.depth = kDepth;
  call.rows = pointers.data();
  call.n_rows = n_rows;
  call.n_panels = 1;
  call.vectors = vectors;
  call.panels = panel;
  call.k_stride = kernels.together(vectors) * kernels.width;
  call.half_stride = call.k_stride * kDepth;
  call.out = out;
  call.out_stride = columns;
  return static_cast<double>(2 * n_rows * kDepth * columns) / least_seconds([&] { kernels.gemm(call); });
}

// The same of bfloat16 parts.
double parts_rate(const PartsKernels& kernels, Parts parts) {
  constexpr int64_t kDepth = 256;
  constexpr int kRows = 2 * kPartsRows, kVectors = 2;
  constexpr int64_t kColumns = kVectors * kPartsColumns, kTiles = 2 * depth_blocks(kDepth);
  uint16_t *rows = nullptr, *panel = nullptr;
  float* out = nullptr;
  const auto memory = laid_out([&](Arena& arena) {
    rows = arena.take<uint16_t>(kTiles * parts.rows * kPartsTile);
    panel = arena.take<uint16_t>(kTiles * parts.panels * kPartsTile);
    out = arena.take<float>(kRows * kColumns);
  });
  PartsCall call{};
  call.depth = kDepth;
  call.parts = parts;
  call.rows = rows;
  call.n_rows = kRows;
  call.vectors = kVectors;
  call.panel = panel;
  call.out = out;
  call.out_stride = kColumns;
  const double seconds = least_seconds([&] { kernels.gemm(call); });
  kernels.release();
  return static_cast<double>(2 * kRows * kDepth * kColumns) / seconds;
}

template <class A>
double rate_of_products(const Kernels<A>& kernels, DType dtype) {
  double rate = tile_rate(kernels);
  if (gains_from_parts(kernels, storage_index(dtype))) {
    rate = std::max(rate, parts_rate(*kernels.parts, parts_of(dtype, /*rounded_rows=*/true)));
  }
  return rate;
}

template <class A>
double time_forward(const Kernels<A>& kernels, CellKind cell, DType dtype, bool saves, int n_rows, int64_t H) {
  const int64_t padded = round_up(H, kernels.width), size = dtype_size(dtype);
  const int64_t columns = gate_count(cell) * padded;
  std::vector<ForwardRow<A>> rows(static_cast<size_t>(n_rows));
  A *rec = nullptr, *xg = nullptr;
  const auto memory = laid_out([&](Arena& arena) {
    rec = arena.take<A>(n_rows * columns);
    xg = arena.take<A>(n_rows * columns);
    for (ForwardRow<A>& row : rows) {
      row.h_prev = row.h = arena.take<A>(padded);
      row.c_prev = row.c = arena.take<A>(padded);
      row.y = arena.take<char>(H * size);
      row.gates = saves ? arena.take<char>(slot_count(cell) * H * size) : nullptr;
      row.cs = saves ? arena.take<char>(H * size) : nullptr;
    }
  });
  ForwardCall<A> call{rec, columns, xg, columns, rows.data(), n_rows, H, 0, padded / kernels.width};
  const auto f = kernels.forward[static_cast<int>(cell)][storage_index(dtype)];
  return least_seconds([&] { f(call); });
}

template <class A>
double time_backward(const Kernels<A>& kernels, CellKind cell, DType dtype, int n_rows, int64_t H) {
  const int64_t padded = round_up(H, kernels.width), size = dtype_size(dtype);
  std::vector<BackwardRow<A>> rows(static_cast<size_t>(n_rows));
  A* rec = nullptr;
  const auto memory = laid_out([&](Arena& arena) {
    rec = arena.take<A>(n_rows * padded);
    for (BackwardRow<A>& row : rows) {
      row = {};
      row.gates = arena.take<char>(slot_count(cell) * H * size);
      row.h_prev = arena.take<char>(H * size);
      row.c_prev = arena.take<char>(H * size);
      row.c = arena.take<char>(H * size);
      row.y = arena.take<char>(H * size);
      row.dy = arena.take<char>(H * size);
      row.carry = row.carry_out = arena.take<A>(padded);
      row.dc = arena.take<A>(padded);
      row.d_gates = arena.take<char>(slot_count(cell) * H * size);
    }
  });
  BackwardCall<A> call{rec, padded, rows.data(), n_rows, H, 0, padded / kernels.width};
  const auto f = kernels.backward[static_cast<int>(cell)][storage_index(dtype)];
  return least_seconds([&] { f(call); });
}

}  // namespace

double product_rate(DType dtype) {
  const InstructionSet& set = selected_kernels();
  return dtype == DType::kFloat64 ? rate_of_products(set.f64, dtype) : rate_of_products(set.f32, dtype);
}

double read_rate(int64_t bytes) {
  check_size("bytes", bytes, int64_t{1} << 34);
  constexpr int64_t kDepth = 64;  // 64 KB a call at most: a call reads what the nearest cache holds, too
  const Kernels<float>& kernels = selected_kernels().f32;
  const int vectors = kMaxTileVectors, n_panels = kernels.max_panels_of(1);
  const int64_t panel = kDepth * vectors * kernels.width;
  const int64_t calls = std::max<int64_t>(bytes / (n_panels * panel * static_cast<int64_t>(sizeof(float))), 1);
  float *row = nullptr, *panels = nullptr, *out = nullptr;
  const auto memory = laid_out([&](Arena& arena) {
    row = arena.take<float>(kDepth);
    panels = arena.take<float>(calls * n_panels * panel);
    out = arena.take<float>(n_panels * vectors * kernels.width);
  });
  const float* const rows[] = {row};
  GemmCall<float> call{};
  call.depth = kDepth;
  call.rows = rows;
  call.n_rows = 1;
  call.n_panels = n_panels;
  call.vectors = vectors;
  call.k_stride = kernels.together(vectors) * kernels.width;
  call.half_stride = call.k_stride * kDepth;
  call.panel_stride = panel;
  call.out = out;
  call.out_stride = n_panels * vectors * kernels.width;
  const double seconds = least_seconds([&] {
    for (int64_t i = 0; i < calls; ++i) {
      call.panels = panels + i * n_panels * panel;
      kernels.gemm(call);
    }
  });
  return static_cast<double>(calls * n_panels * panel) * sizeof(float) / seconds;
}

double pointwise_seconds(CellKind cell, DType dtype, Pointwise pass, int rows, int64_t H) {
  check_size("rows", rows, 256);
  check_size("H", H, 65536);
  return dispatch_storage(dtype, [&](auto storage) {
    const auto& kernels = kernels_of<Arithmetic<decltype(storage)>>(selected_kernels());
    if (pass == Pointwise::kBackward) return time_backward(kernels, cell, dtype, rows, H);
    return time_forward(kernels, cell, dtype, pass == Pointwise::kTraining, rows, H);
  });
}

}  // namespace fused_rnn::cpu
