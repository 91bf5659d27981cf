#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu/scan/previous.h"

namespace harness {

using namespace fused_rnn;
using namespace fused_rnn::cpu;

namespace {

// tests/cases.py: OUTPUT_TOLERANCE and GRADIENT_TOLERANCE, by DType.
constexpr double kOutput[] = {1e-13, 4e-6, 4e-3, 3e-2}, kGradient[] = {1e-12, 2e-5, 2e-2, 1.2e-1};

}  // namespace

double load(DType dtype, const void* base, int64_t index) {
  return dispatch_storage(dtype, [&](auto type) -> double {
    decltype(type) value;
    std::memcpy(&value, static_cast<const char*>(base) + index * static_cast<int64_t>(sizeof value), sizeof value);
    return to_arithmetic(value);
  });
}
void store(DType dtype, double number, void* base, int64_t index) {
  dispatch_storage(dtype, [&](auto type) {
    store_converted(static_cast<Arithmetic<decltype(type)>>(number), &type);
    std::memcpy(static_cast<char*>(base) + index * static_cast<int64_t>(sizeof type), &type, sizeof type);
    return 0;
  });
}

std::string Problem::name() const {
  const char* dtypes[] = {"float64", "float32", "float16", "bfloat16"};
  const char* raggeds[] = {"", "-lengths", "-packed"};
  const auto size = [](const char* letter, int64_t n) { return std::string("-") + letter + std::to_string(n); };
  return traits_of(cell).name + size("T", T) + size("B", B) + size("I", I) + size("H", H) + (P == H ? "" : size("P", P)) +
         (D == 2 ? "-bi" : "") + raggeds[static_cast<int>(ragged)] + (resets ? "-resets" : "") + (states ? "" : "-nohx") +
         (biases ? "" : "-nobias") + (infinite ? "-infinite" : "") + "-" + dtypes[static_cast<int>(dtype)] + " on " +
         instruction_set();
}

ThreadPlan plan_of(const Problem& p, bool backward) {
  fused_rnn::Problem problem{};
  problem.cell = p.cell, problem.dtype = p.dtype;
  problem.T = p.T, problem.B = p.B, problem.I = p.I, problem.H = p.H, problem.P = p.P, problem.D = p.D;
  problem.ragged = p.ragged != Ragged::kDense, problem.training = problem.backward = backward;
  return cpu::plan_of(problem);
}

Inputs make_inputs(const Problem& p) {
  Random random(p.seed);
  Inputs in;
  std::vector<int64_t> lengths(static_cast<size_t>(p.B), p.T);
  if (p.ragged != Ragged::kDense) {
    // Packed rows have a step at least, and the first row has all.
    for (size_t b = 1; b < lengths.size(); ++b) {
      lengths[b] = p.ragged == Ragged::kPacked ? 1 + random.below(p.T) : random.below(p.T + 1);
    }
  }
  in.N = p.T * p.B;
  if (p.ragged == Ragged::kPacked) {
    std::sort(lengths.rbegin(), lengths.rend());
    in.offsets = {0};
    for (int64_t t = 0; t < p.T; ++t) {
      in.offsets.push_back(in.offsets.back() + std::count_if(lengths.begin(), lengths.end(), [t](auto n) { return n > t; }));
    }
    in.N = in.offsets.back();
  } else if (p.ragged == Ragged::kLengths) {
    in.lengths = lengths;
  }
  const auto values = [&](int64_t count, double scale) {
    Inputs::Values result(static_cast<size_t>(count));
    for (double& value : result) {
      double room;
      store(p.dtype, random.uniform() * scale, &room, 0);
      if (p.infinite && random.below(200) == 0) {
        const double odd[] = {INFINITY, -INFINITY, NAN, 6e4, -3.38e38};
        store(p.dtype, odd[random.below(5)], &room, 0);
      }
      value = load(p.dtype, &room, 0);
    }
    return result;
  };
  const int64_t G = gate_count(p.cell);
  // Sums of the order of 1, so that their rounding is that of tests/cases.py.
  const double scale = 1 / std::sqrt(static_cast<double>(std::max(p.H, p.I)));
  in.x = values(in.N * p.I, 2);
  if (p.states) in.h0 = values(p.D * p.B * p.P, 1);
  if (p.states && traits_of(p.cell).has_c) in.c0 = values(p.D * p.B * p.H, 1);
  for (int d = 0; d < p.D; ++d) {
    in.w_ih[d] = values(G * p.H * p.I, scale);
    in.w_hh[d] = values(G * p.H * p.P, scale);
    if (p.biases) in.b_ih[d] = values(G * p.H, scale), in.b_hh[d] = values(G * p.H, scale);
    if (p.P != p.H) in.w_hr[d] = values(p.P * p.H, scale);
  }
  in.dy = values(in.N * p.D * p.P, 1);
  in.dh_n = values(p.D * p.B * p.P, 1);
  if (traits_of(p.cell).has_c) in.dc_n = values(p.D * p.B * p.H, 1);
  if (p.resets) {
    for (int64_t i = 0; i < in.N; ++i) in.resets.push_back(random.below(4) == 0);
  }
  return in;
}

namespace {

const Result* find(const Results& results, const char* name) {
  for (const Result& result : results) {
    if (std::strcmp(result.name, name) == 0) return &result;
  }
  return nullptr;
}

// Inputs in memory, each with a copy to tell a write by.
class Call {
 public:
  Call(const Problem& p, const Inputs& in, Place place, bool training) : p_(p), place_(place) {
    ForwardParams& f = forward_;
    f.cell = p.cell, f.dtype = p.dtype;
    f.I = p.I, f.H = p.H, f.P = p.P, f.D = p.D;
    f.seq = {p.T, p.B, in.N, static_cast<const int64_t*>(integers(in.lengths)),
             static_cast<const int64_t*>(integers(in.offsets))};
    f.modifier.resets = static_cast<const bool*>(integers(in.resets));
    f.x = values(in.x, true);
    f.h0 = values(in.h0), f.c0 = values(in.c0);
    for (int d = 0; d < p.D; ++d) {
      f.weights[d] = {{values(in.w_ih[d], true), p.dtype},
                      {values(in.w_hh[d]), p.dtype},
                      values(in.b_ih[d]),
                      values(in.b_hh[d]),
                      {values(in.w_hr[d]), p.dtype}};
    }
    const CellTraits cell = traits_of(p.cell);
    f.y = output("y", in.N * p.D * p.P);
    f.h_n = output("h_n", p.D * p.B * p.P);
    if (cell.has_c) f.c_n = output("c_n", p.D * p.B * p.H);
    f.training = training;
    if (training && cell.saved > 0) f.gates = output("gates", p.D * in.N * cell.slots * p.H);
    if (training && cell.has_c) f.cs = output("cs", p.D * in.N * p.H);
    if (!training) return;
    BackwardParams& b = backward_;
    b.cell = p.cell, b.dtype = p.dtype;
    b.H = p.H, b.P = p.P, b.D = p.D;
    b.seq = f.seq;
    b.h0 = f.h0, b.c0 = f.c0;
    std::copy(std::begin(f.weights), std::end(f.weights), b.weights);
    b.y = f.y, b.gates = f.gates, b.cs = f.cs;
    b.dy = values(in.dy), b.dh_n = values(in.dh_n), b.dc_n = values(in.dc_n);
    b.d_gates = output("d_gates", p.D * in.N * cell.slots * p.H, true);
    if (p.P != p.H) b.d_h = output("d_h", p.D * in.N * p.P, true);
    b.d_h0 = output("d_h0", p.D * p.B * p.P, true);
    if (cell.has_c) b.d_c0 = output("d_c0", p.D * p.B * p.H, true);
  }

  void forward() {
    cpu::forward(forward_, [this](int64_t bytes) { return workspace(bytes); });
    check();
  }
  void backward() {
    cpu::backward(backward_, [this](int64_t bytes) { return workspace(bytes); });
    check();
  }
  // Every row's h before its step, bit by bit.
  void previous() const {
    const Sequence& s = forward_.seq;
    const int64_t row_bytes = p_.P * dtype_size(p_.dtype);
    for (int d = 0; d < p_.D; ++d) {
      const Array found(s.N * row_bytes, place_);
      const char* y = static_cast<const char*>(forward_.y) + d * row_bytes;
      const char* h0 = forward_.h0 ? static_cast<const char*>(forward_.h0) + d * p_.B * row_bytes : nullptr;
      previous_rows({s, forward_.modifier, d == 1, row_bytes, y, p_.D * row_bytes, h0, found.data()});
      const std::vector<char> zeros(static_cast<size_t>(row_bytes), 0);
      for (int64_t t = 0; t < p_.T; ++t) {
        for (int64_t b = 0; b < p_.B; ++b) {
          if (s.offsets && !is_active(s, t, b)) continue;  // no row
          const int64_t row = row_of(s, t, b), before = d == 0 ? t - 1 : t + 1;
          const char* expected = zeros.data();
          if (is_active(s, t, b) && !is_reset(forward_.modifier, row)) {
            if (is_active(s, before, b)) {
              expected = y + row_of(s, before, b) * p_.D * row_bytes;
            } else if (h0) {
              expected = h0 + b * row_bytes;
            }
          }
          if (std::memcmp(static_cast<const char*>(found.data()) + row * row_bytes, expected, zeros.size()) != 0) {
            throw std::runtime_error("previous_rows: row " + std::to_string(row));
          }
        }
      }
    }
  }
  // Puts results of another call in the place of what forward saved.
  void replace_saved(const Results& saved) {
    for (const char* name : {"y", "gates", "cs"}) {
      const auto to =
          std::find_if(outputs_.begin(), outputs_.end(), [&](auto& o) { return std::strcmp(o.name, name) == 0; });
      const Result* from = find(saved, name);
      for (size_t i = 0; from && i < from->values.size(); ++i) {
        store(p_.dtype, from->values[i], to->array.data(), static_cast<int64_t>(i));
      }
    }
  }
  Results results() const {
    Results all;
    for (const Output& output : outputs_) {
      Result result{output.name, output.gradient, {}};
      const int64_t count = output.array.bytes() / dtype_size(p_.dtype);
      for (int64_t i = 0; i < count; ++i) result.values.push_back(load(p_.dtype, output.array.data(), i));
      all.push_back(std::move(result));
    }
    return all;
  }

 private:
  struct Input {
    Array array;
    std::vector<char> copy;
  };
  struct Output {
    const char* name;
    bool gradient;
    Array array;
  };

  const void* owned(Array array) {
    const char* from = static_cast<const char*>(array.data());
    inputs_.push_back({std::move(array), {}});
    inputs_.back().copy.assign(from, from + inputs_.back().array.bytes());
    return inputs_.back().array.data();
  }
  // Null for no values, unless they are needed.
  const void* values(const std::vector<double>& numbers, bool needed = false) {
    if (numbers.empty() && !needed) return nullptr;
    Array array(static_cast<int64_t>(numbers.size()) * dtype_size(p_.dtype), place_);
    for (size_t i = 0; i < numbers.size(); ++i) store(p_.dtype, numbers[i], array.data(), static_cast<int64_t>(i));
    return owned(std::move(array));
  }
  template <class E>
  const void* integers(const std::vector<E>& numbers) {
    if (numbers.empty()) return nullptr;
    Array array(static_cast<int64_t>(numbers.size() * sizeof(E)), place_);
    std::memcpy(array.data(), numbers.data(), numbers.size() * sizeof(E));
    return owned(std::move(array));
  }
  void* output(const char* name, int64_t count, bool gradient = false) {
    outputs_.push_back({name, gradient, Array(count * dtype_size(p_.dtype), place_)});
    return outputs_.back().array.data();
  }
  void* workspace(int64_t bytes) {
    allocation_point();
    const NoFailures none;
    workspace_ = Array(bytes, place_);
    return workspace_.data();
  }
  void check() const {
    const NoFailures none;
    for (const Input& input : inputs_) {
      if (!input.copy.empty() && std::memcmp(input.copy.data(), input.array.data(), input.copy.size()) != 0) {
        throw std::runtime_error("an input was written to");
      }
    }
    if (!gaps_are_untouched(workspace_.data(), workspace_.bytes())) {
      throw std::runtime_error("a gap of the workspace was written to");
    }
  }

  const Problem& p_;
  const Place place_;
  ForwardParams forward_{};
  BackwardParams backward_{};
  std::vector<Input> inputs_;
  std::vector<Output> outputs_;
  Array workspace_;
};

}  // namespace

Results infer(const Problem& problem, const Inputs& inputs, Place place) {
  const auto make = [&] {
    const NoFailures none;
    return Call(problem, inputs, place, /*training=*/false);
  };
  Call call = make();
  call.forward();
  const NoFailures none;
  return call.results();
}

Results train(const Problem& problem, const Inputs& inputs, Place place, const Results* saved) {
  const auto make = [&] {
    const NoFailures none;
    return Call(problem, inputs, place, /*training=*/true);
  };
  Call call = make();
  call.forward();
  if (saved) call.replace_saved(*saved);
  call.backward();
  {
    const NoFailures none;
    call.previous();
  }
  const NoFailures none;
  return call.results();
}

void expect_right(const Problem& problem, const Inputs& inputs, const Results& found) {
  select_set("portable");
  set_threads(1);
  Problem exact = problem;
  exact.dtype = DType::kFloat64;
  const Results own = train(exact, inputs, Place::kHeap);
  // Gradients of what forward saved: whether a ReLU passes one depends on the last bit of its output.
  const Results gradients = find(found, "d_gates") ? train(exact, inputs, Place::kHeap, &found) : Results{};
  for (const Result& result : found) {
    const Result* same = find(result.gradient ? gradients : own, result.name);
    if (!same || same->values.size() != result.values.size()) throw std::runtime_error("other results");
    double largest = 1;
    for (const double value : same->values) largest = std::max(largest, std::abs(value));
    const double tolerance = (result.gradient ? kGradient : kOutput)[static_cast<int>(problem.dtype)] * largest;
    for (size_t i = 0; i < result.values.size(); ++i) {
      if (std::abs(result.values[i] - same->values[i]) <= tolerance) continue;
      throw std::runtime_error(std::string(result.name) + "[" + std::to_string(i) +
                               "]: " + std::to_string(result.values[i]) + ", expected " + std::to_string(same->values[i]));
    }
  }
}

void expect_equal(const Results& found, const Results& expected) {
  if (found.size() != expected.size()) throw std::runtime_error("other results");
  for (size_t i = 0; i < found.size(); ++i) {
    const auto &a = found[i].values, &b = expected[i].values;
    const bool equal = a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) {
                         return x == y || (std::isnan(x) && std::isnan(y));
                       });
    if (!equal) throw std::runtime_error(std::string(found[i].name) + ": differs between two runs");
  }
}

}  // namespace harness
