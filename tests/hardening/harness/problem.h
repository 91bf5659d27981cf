// One layer with its inputs, forward and backward on guarded arrays, and the comparison of two such runs.
#pragma once
#include <string>
#include <vector>

#include "harness.h"

namespace harness {

using fused_rnn::CellKind;
using fused_rnn::DType;

enum class Ragged { kDense, kLengths, kPacked };

struct Problem {
  CellKind cell;
  DType dtype;
  int64_t T, B, I, H, P;  // P == H: no projection
  int D;
  Ragged ragged;
  bool resets, states, biases;
  bool infinite;  // a few inputs and weights are infinite or no numbers
  uint64_t seed;
  std::string name() const;
};
// How a call of forward, or of backward, would divide the work now.
fused_rnn::cpu::ThreadPlan plan_of(const Problem& problem, bool backward);

// Values as numbers that the dtype holds.
struct Inputs {
  using Values = std::vector<double>;
  Values x, h0, c0, dy, dh_n, dc_n;
  Values w_ih[2], w_hh[2], b_ih[2], b_hh[2], w_hr[2];
  std::vector<int64_t> lengths, offsets;
  std::vector<char> resets;
  int64_t N;
};
Inputs make_inputs(const Problem& problem);

struct Result {
  const char* name;
  bool gradient;
  std::vector<double> values;
};
using Results = std::vector<Result>;

// Calls with the selected instruction set. Throws std::runtime_error if an input was written to, or a gap of the workspace.
Results infer(const Problem& problem, const Inputs& inputs, Place place);
// Forward, then backward. What forward saved in `saved`, another call's results, takes the place of the call's own before
// backward.
Results train(const Problem& problem, const Inputs& inputs, Place place, const Results* saved = nullptr);

// Compares with the portable kernels in float64, within the tolerances of tests/cases.py. Throws std::runtime_error with the
// name of the first result that is not near. Changes the selected instruction set.
void expect_right(const Problem& problem, const Inputs& inputs, const Results& found);
void expect_equal(const Results& found, const Results& expected);

// A value of a dtype in memory.
double load(DType dtype, const void* base, int64_t index);
void store(DType dtype, double value, void* base, int64_t index);

// A small generator of random numbers.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x1234567) {}
  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool flip() { return next() & 1; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53 * 2 - 1; }
  template <class E>
  const E& pick(const std::vector<E>& of) {
    return of[static_cast<size_t>(below(static_cast<int64_t>(of.size())))];
  }

 private:
  uint64_t state_;
};

}  // namespace harness
