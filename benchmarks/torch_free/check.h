// One layer on the device: forward and backward by a plan, against float64, and twice alike.
#pragma once
#include <device_memory.h>
#include <unistd.h>

#include <stdexcept>

#include "cuda/backend.h"
#include "problem.h"

namespace torch_free {

// A layer's tensors on the device, all outputs NaN at first.
class Layer {
 public:
  ForwardParams forward_params{};
  BackwardParams backward_params{};

  Layer(const Case& c, const Data& d) {
    ForwardParams& f = forward_params;
    BackwardParams& b = backward_params;
    const size_t S = slot_count(c.cell), G = gate_count(c.cell), N = size_t(c.T) * c.B, H = c.H, size = dtype_size(c.dtype);
    const size_t units = size_t(c.D) * c.B * H * size;
    const bool has_c = traits_of(c.cell).has_c;
    f.cell = c.cell, f.dtype = c.dtype, f.allow_tf32 = c.tf32, f.I = c.I, f.H = f.P = c.H, f.D = c.D, f.training = true;
    f.seq = {c.T, c.B, static_cast<int64_t>(N), nullptr, nullptr};
    if (c.lengths) f.seq.lengths = static_cast<int64_t*>(memory_.put(d.lengths.data(), d.lengths.size() * 8));
    if (c.resets) f.modifier.resets = static_cast<bool*>(memory_.put(d.resets.data(), N));
    f.x = put(c.dtype, d.x), f.h0 = put(c.dtype, d.h0), f.c0 = has_c ? put(c.dtype, d.c0) : nullptr;
    for (int dir = 0; dir < c.D; ++dir) {
      f.weights[dir] = {{put(c.dtype, d.w_ih[dir]), c.dtype},
                        {put(c.dtype, d.w_hh[dir]), c.dtype},
                        put(c.dtype, d.b_ih[dir]),
                        put(c.dtype, d.b_hh[dir]),
                        {nullptr, c.dtype}};
    }
    Doubles slots(c.D * N * S * H, std::nan(""));  // the projection in the first G of S
    for (size_t row = 0; row < c.D * N && !d.projection.empty(); ++row) {
      std::copy_n(&d.projection[row * G * H], G * H, &slots[row * S * H]);
    }
    projection_ = put(c.dtype, slots), gate_bytes_ = slots.size() * size;
    f.gates = memory_.take(gate_bytes_), f.y = memory_.take(N * c.D * H * size), f.h_n = memory_.take(units);
    if (has_c) f.c_n = memory_.take(units), f.cs = memory_.take(c.D * N * H * size);
    b.cell = c.cell, b.dtype = c.dtype, b.allow_tf32 = c.tf32, b.H = b.P = c.H, b.D = c.D, b.seq = f.seq;
    b.modifier = f.modifier, b.h0 = f.h0, b.c0 = f.c0, b.weights[0] = f.weights[0], b.weights[1] = f.weights[1];
    b.y = f.y, b.gates = f.gates, b.cs = f.cs, b.dy = put(c.dtype, d.dy), b.dh_n = put(c.dtype, d.dh_n);
    b.dc_n = has_c ? put(c.dtype, d.dc_n) : nullptr;
    b.d_gates = memory_.take(gate_bytes_), b.d_h0 = c.grad_h0 ? memory_.take(units) : nullptr;
    b.d_c0 = has_c ? memory_.take(units) : nullptr;
  }

  // The plans of both passes; throws std::invalid_argument with the reason if the choice cannot serve the layer.
  void plan(const FamilyChoice& choice) {
    const auto made = [&](const auto& params) { return make_plan(cuda::problem_of(params), cuda::device_info(0), choice); };
    forward_plan = made(forward_params), backward_plan = made(backward_params);
    forward_params.workspace = memory_.take(forward_plan.workspace_bytes);
    backward_params.workspace = memory_.take(backward_plan.workspace_bytes);
  }
  void forward(void* stream) {
    forward_params.gates = copied(forward_params.gates, projection_, gate_bytes_, stream);
    backward_params.gates = forward_params.gates;
    launch_forward(stream);
  }
  void launch_forward(void* stream) {
    run([&] { cuda::forward(forward_params, forward_plan, stream); });
  }
  void backward(void* stream) {
    run([&] { cuda::backward(backward_params, backward_plan, stream); });
  }

  Plan forward_plan, backward_plan;

 private:
  void* put(DType dtype, const Doubles& v) {
    if (v.empty()) return nullptr;
    std::vector<unsigned char> bytes(v.size() * dtype_size(dtype));
    for (size_t i = 0; i < v.size(); ++i) store(dtype, bytes.data(), i, v[i]);
    return memory_.put(bytes.data(), bytes.size());
  }

  Memory memory_;
  void* projection_;
  size_t gate_bytes_;
};

// A kernel whose blocks wait for each other may hang: so many seconds after the start of a case the process gets SIGALRM.
constexpr unsigned kCaseSeconds = 20;

// Compares cases and counts those that are wrong.
class Checker {
 public:
  std::string current;        // what runs now
  int wrong = 0, right = 0;   // cases
  double of_the_allowed = 1;  // the share of the allowed errors that is accepted

  // repeats: further runs, whose results must have the same bits.
  void check(const Case& c, const FamilyChoice& choice, int repeats) {
    current = name_of(c);
    Data d = make_data(c, 7);
    Layer layer(c, d);
    try {
      layer.plan(choice);
    } catch (const std::invalid_argument& reason) {
      std::printf("skip %s: %s\n", current.c_str(), reason.what());
      return;
    }
    expect(c, d);
    alarm(kCaseSeconds);
    faults_ = 0;
    layer.forward(nullptr);
    layer.backward(nullptr);
    wait(current);
    compare_all(c, d, layer);
    const size_t size = dtype_size(c.dtype), y_bytes = d.y.size() * size, gate_bytes = d.d_gates.size() * size;
    const auto y = fetch(layer.forward_params.y, y_bytes), d_gates = fetch(layer.backward_params.d_gates, gate_bytes);
    int different = 0;
    for (int i = 0; i < repeats; ++i) {
      layer.forward(nullptr);
      layer.backward(nullptr);
      wait(current);
      different +=
          fetch(layer.forward_params.y, y_bytes) != y || fetch(layer.backward_params.d_gates, gate_bytes) != d_gates;
    }
    if (different) ++faults_, std::printf("NOT REPEATABLE %s: %d of %d runs differ\n", current.c_str(), different, repeats);
    faults_ ? ++wrong : ++right;
    std::printf("%s %s: %s / %s\n", faults_ ? "BAD" : "ok", current.c_str(), to_string(layer.forward_plan.family),
                to_string(layer.backward_plan.family));
    std::fflush(stdout);
  }

 private:
  // Tolerances of fused_rnn/tuning/cases.py.
  void compare_all(const Case& c, const Data& d, const Layer& layer) {
    const ForwardParams& f = layer.forward_params;
    const BackwardParams& b = layer.backward_params;
    const bool tf32 = c.tf32 && c.dtype == DType::kFloat32;
    const double output[] = {1e-13, tf32 ? 4e-3 : 4e-6, 4e-3, 3e-2}, gradient[] = {1e-12, tf32 ? 2e-2 : 2e-5, 2e-2, 1.2e-1};
    const double growth = std::max(1.0, std::sqrt(c.H / 32.0));
    const double of_output = output[static_cast<int>(c.dtype)] * growth;
    const double of_gradient = gradient[static_cast<int>(c.dtype)] * growth;
    const bool has_c = traits_of(c.cell).has_c;
    compare("y", c, f.y, d.y, of_output);
    compare("h_n", c, f.h_n, d.h_n, of_output);
    if (has_c) compare("c_n", c, f.c_n, d.c_n, of_output);
    if (has_c) compare("cs", c, f.cs, d.cs, of_output);
    if (traits_of(c.cell).saved > 0) compare("gates", c, f.gates, d.gates, of_output);
    compare("d_gates", c, b.d_gates, d.d_gates, of_gradient);
    if (c.grad_h0) compare("d_h0", c, b.d_h0, d.d_h0, of_gradient);
    if (has_c) compare("d_c0", c, b.d_c0, d.d_c0, of_gradient);
  }

  void compare(const char* what, const Case& c, const void* p, const Doubles& expected, double allowed) {
    const auto got = fetch(p, expected.size() * dtype_size(c.dtype));
    double worst = 0, size = 1;
    size_t at = 0;
    for (double v : expected) size = std::max(size, std::fabs(v));
    for (size_t i = 0; i < expected.size() && !std::isnan(worst); ++i) {
      const double error = std::fabs(load(c.dtype, got.data(), i) - expected[i]) / size;
      if (!(error <= worst)) worst = error, at = i;
    }
    allowed *= of_the_allowed;
    if (worst <= allowed) return;
    ++faults_;
    std::printf("WRONG %s: %s: error %.3g, allowed %.3g, at element %zu of %zu\n", current.c_str(), what, worst, allowed, at,
                expected.size());
  }

  int faults_ = 0;
};

// The cases of a family: every cell and arithmetic, small layers or large ones.
inline void check_family(Checker& checker, const FamilyChoice& choice, bool large, int repeats) {
  const std::pair<DType, bool> kinds[] = {
      {DType::kFloat32, false}, {DType::kFloat32, true}, {DType::kFloat16, false}, {DType::kBFloat16, false}};
  const bool one_step = choice.forced == Family::kSingle, one_block = choice.forced == Family::kBlock;
  for (CellKind cell : {CellKind::kRnnTanh, CellKind::kLstm, CellKind::kGru}) {
    for (const auto& [dtype, tf32] : kinds) {
      const int T = one_step ? 1 : large ? 4 : 6;
      if (large) {
        checker.check({cell, dtype, tf32, T, 64, 4, 256, 1, false, false, true, true}, choice, repeats);
        checker.check({cell, dtype, tf32, T, 20, 4, 640, 1, true, true, true, true}, choice, repeats);
      } else {
        checker.check({cell, dtype, tf32, T, 3, 4, 6, 1, false, false, true, true}, choice, repeats);
        checker.check({cell, dtype, tf32, T, 9, 5, one_block ? 34 : 33, 2, true, true, true, true}, choice, repeats);
        checker.check({cell, dtype, tf32, T, 17, 8, one_block ? 128 : 130, 1, true, false, false, false}, choice, repeats);
      }
    }
  }
}

}  // namespace torch_free
