// Runs layers and products in every form on guarded arrays.
//   main sets                              the instruction sets that are here, a line each
//   main layers SET SEED FIRST SECONDS     random layers from number FIRST on, for so long
//   main products SET SEED FIRST SECONDS   random matrix products likewise
//   main allocations SET                   every allocation of a call fails once
//   main threads SEED FIRST SECONDS        layers on several threads, and several calling threads
//   main fault KIND                        what must be found: a write to a "gap", a read beyond a "page", a "race"
// A failure prints the case's number: the same command with it as FIRST and 0 SECONDS runs that case alone.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>

#include "cpu/arena.h"
#include "cpu/gemm/matmul.h"
#include "cpu/gemm/weight_cache.h"
#include "cpu/threads.h"
#include "problem.h"

namespace {

using namespace harness;
namespace cpu = fused_rnn::cpu;

using Dims = std::vector<int64_t>;

// One less, as many and one more than whole vectors, panels and pairs of them.
Dims edges(int64_t width) {
  Dims all{1, 2, 3, 5, 33, 70};
  for (const int64_t whole : {width, 2 * width, 4 * width, 8 * width}) all.insert(all.end(), {whole - 1, whole, whole + 1});
  for (int64_t& size : all) size = std::max<int64_t>(size, 1);
  return all;
}

int64_t width_of(DType dtype) {
  const cpu::InstructionSet& set = cpu::selected_kernels();
  return dtype == DType::kFloat64 ? set.f64.width : set.f32.width;
}

// Multiply-adds of forward, about.
int64_t work_of(const Problem& p) { return p.T * p.B * p.D * fused_rnn::gate_count(p.cell) * p.H * (p.I + p.P + 8); }

// An output projection goes with a c, which keeps H where h has P (torch.nn has it for its LSTM alone).
bool may_project(CellKind cell) { return fused_rnn::traits_of(cell).may_project; }

// Of at most so much work.
Problem random_problem(uint64_t seed, int64_t most) {
  const Dims rows{1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 34, 50};
  for (Random random(seed);;) {
    Problem p{};
    p.cell = static_cast<CellKind>(random.below(fused_rnn::kCellCount));
    p.dtype = static_cast<DType>(random.below(4));
    const Dims sizes = edges(width_of(p.dtype));
    p.T = random.pick(Dims{1, 2, 3, 5, 8});
    p.B = random.pick(rows);
    p.I = random.below(12) == 0 ? 0 : random.pick(sizes);
    p.P = p.H = random.pick(sizes);
    if (may_project(p.cell) && p.H > 1 && random.flip()) p.P = std::min(random.pick(sizes), p.H - 1);
    p.D = 1 + static_cast<int>(random.flip());
    p.ragged = static_cast<Ragged>(random.below(3));
    p.resets = random.below(3) == 0;
    p.states = random.flip();
    p.biases = random.below(4) != 0;
    p.infinite = random.below(10) == 0;
    // A step or two of several rows of many features, whose weights are cut into parts as they lie.
    if (random.below(8) == 0) {
      p.T = 1 + random.below(2), p.B = random.pick(Dims{2, 10, 16, 17, 32, 33, 48, 64});
      p.I = random.pick(Dims{256, 259, 515}), p.H = p.P = random.pick(Dims{7, 17, 40});
    }
    p.seed = random.next();
    if (work_of(p) <= most) return p;
  }
}

void run_layer(const std::string& set, uint64_t seed) {
  select_set(set);
  Random random(seed);
  const Problem p = random_problem(random.next(), 2000000);
  const Inputs inputs = make_inputs(p);
  const Place place = static_cast<Place>(random.below(3));
  const int threads = 1 + static_cast<int>(random.below(4));
  // Now and then fewer threads than OpenMP promised: the call is then made by one.
  set_threads(threads, random.below(8) == 0 ? 1 : threads);
  set_case(p.name() + ", place " + std::to_string(static_cast<int>(place)) + ", " + std::to_string(threads) + " threads");
  Results found = train(p, inputs, place);
  const Results first = infer(p, inputs, place), second = infer(p, inputs, place);
  expect_equal(second, first);
  Results outputs;
  for (const Result& result : found) {
    for (const Result& other : first) {
      if (std::strcmp(result.name, other.name) == 0) outputs.push_back(result);
    }
  }
  expect_equal(outputs, first);
  if (!p.infinite) expect_right(p, inputs, found);
}

void run_product(const std::string& set, uint64_t seed) {
  select_set(set);
  Random random(seed);
  cpu::MatmulParams p{};
  p.dtype = static_cast<DType>(random.below(4));
  const Dims sizes{1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70, 127, 129, 257, 520};
  do {
    p.M = random.pick(sizes), p.N = random.pick(sizes), p.K = random.below(8) == 0 ? 1600 : random.pick(sizes);
  } while (p.M * p.N * p.K > 6000000);
  const auto& f32 = cpu::selected_kernels().f32;
  const bool parts = p.dtype != DType::kFloat64 && cpu::gains_from_parts(f32, cpu::storage_index(p.dtype)) && random.flip();
  if (!parts && fused_rnn::dtype_size(p.dtype) == 2) p.dtype = DType::kFloat32;
  p.out_dtype = parts && random.flip() ? DType::kFloat32 : p.dtype;
  p.a_transposed = random.flip();
  const bool add = !parts && random.flip();
  const int64_t gaps[] = {random.below(3), random.below(3), random.below(3)};
  p.a_stride = (p.a_transposed ? p.M : p.K) + gaps[0];
  p.b_stride = p.N + gaps[1], p.out_stride = p.N + gaps[2];
  const Place place = static_cast<Place>(random.below(3));
  const int threads = 1 + static_cast<int>(random.below(3));
  set_threads(threads);
  set_case("product " + std::to_string(p.M) + "x" + std::to_string(p.N) + "x" + std::to_string(p.K) + " dtype " +
           std::to_string(static_cast<int>(p.dtype)) + " to " + std::to_string(static_cast<int>(p.out_dtype)) +
           (p.a_transposed ? " transposed" : "") +
           (parts ? " of parts"
            : add ? " added"
                  : "") +
           " on " + set);
  // The last row has no gap behind it.
  const auto matrix = [&](DType dtype, int64_t rows, int64_t columns, int64_t stride) {
    return Array(((rows - 1) * stride + columns) * fused_rnn::dtype_size(dtype), place);
  };
  const auto fill = [&](const Array& array, DType dtype, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) store(dtype, random.uniform(), array.data(), r * stride + c);
    }
  };
  const int64_t a_rows = p.a_transposed ? p.K : p.M, a_columns = p.a_transposed ? p.M : p.K;
  const Array a = matrix(p.dtype, a_rows, a_columns, p.a_stride), b = matrix(p.dtype, p.K, p.N, p.b_stride);
  const Array out = matrix(p.out_dtype, p.M, p.N, p.out_stride);
  fill(a, p.dtype, a_rows, a_columns, p.a_stride);
  fill(b, p.dtype, p.K, p.N, p.b_stride);
  if (add) fill(out, p.out_dtype, p.M, p.N, p.out_stride);
  p.a = a.data(), p.b = b.data(), p.out = out.data();
  std::vector<double> before;
  for (int64_t i = 0; i < out.bytes() / fused_rnn::dtype_size(p.out_dtype); ++i)
    before.push_back(load(p.out_dtype, p.out, i));
  Array workspace;
  const cpu::Allocate allocate = [&](int64_t bytes) {
    workspace = Array(bytes, place);
    return workspace.data();
  };
  if (parts) {
    if (!cpu::matmul(p, allocate)) throw std::runtime_error("finite numbers are said to be infinite");
  } else {
    cpu::small_matmul(p, add, allocate);
  }
  if (!gaps_are_untouched(workspace.data(), workspace.bytes())) throw std::runtime_error("a gap was written to");
  // Sums are rounded to the type of out. A float16 has two parts, and a product leaves out the pair of the lesser ones.
  const double rounding[] = {1e-14, 2e-6, 2e-3, 1e-2};
  const double tolerance = std::max(rounding[static_cast<int>(p.out_dtype)], p.dtype == DType::kFloat16 ? 2e-5 : 0);
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t n = 0; n < p.out_stride && m * p.out_stride + n < static_cast<int64_t>(before.size()); ++n) {
      const int64_t at = m * p.out_stride + n;
      const double found = load(p.out_dtype, p.out, at);
      if (n >= p.N) {
        if (!std::isnan(found)) throw std::runtime_error("a gap between rows of the product was written to");
        continue;
      }
      double sum = add ? before[at] : 0, magnitude = 1;
      for (int64_t k = 0; k < p.K; ++k) {
        const double term = load(p.dtype, p.a, p.a_transposed ? k * p.a_stride + m : m * p.a_stride + k) *
                            load(p.dtype, p.b, k * p.b_stride + n);
        sum += term, magnitude += std::abs(term);
      }
      if (!(std::abs(found - sum) <= tolerance * magnitude)) {
        throw std::runtime_error("element " + std::to_string(m) + ", " + std::to_string(n) + ": " + std::to_string(found) +
                                 ", expected " + std::to_string(sum));
      }
    }
  }
}

// What the cache of weights says of itself. No call has leased a matrix now, so that bytes without matrices are lost ones.
void expect_consistent_cache() {
  const cpu::WeightCacheStatistics s = cpu::weight_cache_statistics();
  if (s.bytes < 0 || s.bytes > s.limit || (s.matrices == 0) != (s.bytes == 0)) {
    throw std::runtime_error("the cache of weights has " + std::to_string(s.matrices) + " matrices in " +
                             std::to_string(s.bytes) + " bytes");
  }
}

// Every allocation of the call fails once; the call after it is right.
void expect_survival(const std::string& what, const std::function<Results()>& call) {
  const Results expected = call();
  for (int64_t n = 0;; ++n) {
    set_case(what + ", allocation " + std::to_string(n));
    bool threw = false;
    fail_allocation(n);
    try {
      const Results results = call();
      const NoFailures none;
      expect_equal(results, expected);
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    const bool failed = disarm();
    if (threw && !failed) throw std::runtime_error("std::bad_alloc with no allocation that failed");
    expect_consistent_cache();
    expect_equal(call(), expected);
    if (!failed) {
      std::printf("%s: %d allocations\n", what.c_str(), static_cast<int>(n));
      return;
    }
    if (n > 1000) throw std::runtime_error("more than 1000 allocations");
  }
}

void run_allocations(const std::string& set) {
  const struct {
    CellKind cell;
    DType dtype;
    int threads;
  } calls[] = {{CellKind::kGru, DType::kFloat32, 1},
               {CellKind::kLstm, DType::kFloat32, 1},
               {CellKind::kLstm, DType::kBFloat16, 3},
               {CellKind::kRnnTanh, DType::kFloat64, 3}};
  for (const auto& [cell, dtype, threads] : calls) {
    const int64_t P = may_project(cell) ? 7 : 20;
    const Problem p{cell, dtype, 2, 17, 5, 20, P, 2, Ragged::kLengths, true, true, true, false, 1};
    select_set(set);
    set_threads(threads);
    const Inputs inputs = make_inputs(p);
    const std::string name = p.name() + " " + std::to_string(threads) + " threads";
    // The weights lie elsewhere at each call: a matrix is packed into new memory, or into memory that the cache had.
    expect_survival("inference " + name, [&] { return infer(p, inputs, Place::kHeap); });
    expect_survival("training " + name, [&] { return train(p, inputs, Place::kHeap); });
  }
}

// Plans seen: teams of each direction, of parts of the batch, and of several threads.
struct {
  int directions = 0, batch = 0, split = 0;
} seen;

// A layer's call on several threads, then the same inferences by several callers at once.
void run_threads(uint64_t seed) {
  Random random(seed);
  const std::vector<std::string> all = sets();
  // The model in plain C++ takes ten times as long as vectors.
  const bool parts = random.below(4) == 0;
  select_set(parts ? "parts" : all.front());
  const int threads = 2 + static_cast<int>(random.below(3));
  set_threads(threads);
  Problem p{};
  do {
    p = random_problem(random.next(), 100000);
    p.T = 3, p.I = random.pick(Dims{3, 17}), p.B = random.pick(Dims{1, 2, 3, 5, 9, 16, 33});
    p.P = p.H = random.pick(Dims{48, 96, 130, 200, 270});
    if (may_project(p.cell) && random.flip()) p.P = 40;
  } while (work_of(p) > (parts ? 500000 : 5000000) || (plan_of(p, false).threads() == 1 && plan_of(p, true).threads() == 1));
  for (const bool backward : {false, true}) {
    const cpu::ThreadPlan plan = plan_of(p, backward);
    seen.directions += plan.direction_teams > 1, seen.batch += plan.batch_teams > 1, seen.split += plan.split > 1;
  }
  const Inputs inputs = make_inputs(p);
  set_case(p.name() + ", " + std::to_string(threads) + " threads");
  train(p, inputs, Place::kHeap);
  const Results first = infer(p, inputs, Place::kHeap);
  set_threads(1 + static_cast<int>(random.below(2)));
  std::vector<std::thread> callers;
  std::vector<std::string> errors(2);
  for (std::string& error : errors) {
    callers.emplace_back([&] {
      try {
        expect_equal(infer(p, inputs, Place::kHeap), first);
      } catch (const std::exception& e) {
        error = e.what();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

void make_fault(const std::string& kind) {
  if (kind == "gap") {
    const Array workspace(4096, Place::kEnd);
    cpu::Arena arena(workspace.data());
    float* const array = arena.take<float>(5);
    arena.take<float>(5);
    volatile int64_t past = 5;
    array[past] = 1;
  } else if (kind == "page") {
    const Array array(20, Place::kEnd);
    volatile int64_t past = 5;
    std::printf("%g\n", static_cast<const float*>(array.data())[past]);
  } else {
    set_threads(2);
    int64_t sum = 0;
    cpu::run_threads(2, [&](int) { ++sum; });
    std::printf("%d\n", static_cast<int>(sum));
  }
}

// Cases from `first` on until the time is over, at least one; the number of each is its seed.
template <class F>
void run_for(const char* const* args, F&& run) {
  const uint64_t seed = std::strtoull(args[0], nullptr, 10);
  uint64_t number = std::strtoull(args[1], nullptr, 10);
  const double seconds = std::atof(args[2]);
  const auto start = std::chrono::steady_clock::now();
  uint64_t done = 0;
  do {
    try {
      run(seed * 1000003 + number);
    } catch (const std::exception& error) {
      throw std::runtime_error("case " + std::to_string(number) + " of seed " + std::to_string(seed) + ", " + get_case() +
                               ": " + error.what());
    }
    ++number, ++done;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%d cases\n", static_cast<int>(done));
}

int run(int count, char** args) {
  const std::string mode = count > 1 ? args[1] : "", set = count > 2 ? args[2] : "";
  if (mode == "sets") {
    for (const std::string& name : sets()) std::printf("%s\n", name.c_str());
  } else if (mode == "layers" && count == 6) {
    run_for(args + 3, [&](uint64_t seed) { run_layer(set, seed); });
  } else if (mode == "products" && count == 6) {
    run_for(args + 3, [&](uint64_t seed) { run_product(set, seed); });
  } else if (mode == "allocations" && count == 3) {
    run_allocations(set);
  } else if (mode == "fault" && count == 3) {
    make_fault(args[2]);
  } else if (mode == "threads" && count == 5) {
    run_for(args + 2, [&](uint64_t seed) { run_threads(seed); });
    std::printf("plans with teams by direction: %d, by batch: %d, of several threads: %d\n", seen.directions, seen.batch,
                seen.split);
  } else {
    std::fprintf(stderr, "usage: the first lines of main.cpp\n");
    return 2;
  }
  return 0;
}

}  // namespace

int main(int count, char** args) {
  report_case_at_death();
  try {
    return run(count, args);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    set_case("");
    return 1;
  }
}
