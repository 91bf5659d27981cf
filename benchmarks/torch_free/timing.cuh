// Microseconds of a step, in a stream and as a replayed graph, beside the cost model's: a line of JSON for each layer.
#pragma once
#include <chrono>
#include <tuple>

#include "check.h"

namespace torch_free {

inline double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

// Times of one pass, the median of some, in microseconds.
struct PassTime {
  double stream, graph, host;
};

class PassTimer {
 public:
  PassTimer() {
    simt::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    simt::check(cudaEventCreate(&begin_), "event");
    simt::check(cudaEventCreate(&end_), "event");
  }
  cudaStream_t stream() const { return stream_; }

  PassTime time(const std::function<void()>& launches) {
    launches();
    simt::check(cudaStreamSynchronize(stream_), "warm-up");
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    simt::check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    launches();
    simt::check(cudaStreamEndCapture(stream_, &graph), "capture");
    simt::check(cudaGraphInstantiate(&replay, graph, 0), "graph");
    std::vector<double> in_stream, in_graph, on_host;
    for (int i = 0; i < 7; ++i) {
      in_stream.push_back(between([&] {
        const auto start = std::chrono::steady_clock::now();
        launches();
        on_host.push_back(since(start));
      }));
      in_graph.push_back(between([&] { simt::check(cudaGraphLaunch(replay, stream_), "graph"); }));
    }
    simt::check(cudaGraphExecDestroy(replay), "graph");
    simt::check(cudaGraphDestroy(graph), "graph");
    return {median(in_stream), median(in_graph), median(on_host)};
  }

 private:
  double between(const std::function<void()>& work) {
    float ms;
    simt::check(cudaEventRecord(begin_, stream_), "event");
    work();
    simt::check(cudaEventRecord(end_, stream_), "event");
    simt::check(cudaEventSynchronize(end_), "timing");
    simt::check(cudaEventElapsedTime(&ms, begin_, end_), "event");
    return ms * 1e3;
  }
  static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
  }

  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

// Data whose values do not matter but are finite, quickly made; nothing is expected of them.
inline Data quick_data(const Case& c) {
  Data d;
  uint32_t state = 1;
  const auto random = [&] { return double((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1; };
  const size_t G = gate_count(c.cell), H = c.H, rows = size_t(c.T) * c.B;
  d.w_hh[0].resize(G * H * H);
  for (double& e : d.w_hh[0]) e = random() * 0.5 / std::sqrt(double(H));
  d.b_hh[0].assign(G * H, 0.1), d.b_ih[0] = d.b_hh[0], d.w_ih[0].assign(16, 0.1), d.x.assign(16, 0.1);
  d.projection.resize(rows * G * H);
  for (double& e : d.projection) e = random();
  d.dy.assign(rows * H, 0.01), d.dh_n.assign(c.B * H, 0.01), d.dc_n = d.dh_n;
  return d;
}

// most: steps of a layer; fewer where the host would take long to make the inputs.
inline void time_family(Checker& progress, const FamilyChoice& choice, int most) {
  PassTimer timer;
  const std::pair<DType, bool> kinds[] = {{DType::kFloat32, true}, {DType::kFloat16, false}};
  const std::pair<int, int> sizes[] = {{16, 64},  {1, 128},   {16, 128},  {32, 256},
                                       {64, 512}, {64, 1024}, {256, 512}, {256, 1024}};
  for (CellKind cell : {CellKind::kLstm, CellKind::kGru, CellKind::kRnnTanh}) {
    for (const auto& [dtype, tf32] : kinds) {
      for (const auto& [B, H] : sizes) {
        const int T = std::clamp((1 << 23) / (B * gate_count(cell) * H), 16, most);
        const Case c{cell, dtype, tf32, T, B, H, H, 1, false, false, false, false};
        progress.current = name_of(c);
        Layer layer(c, quick_data(c));
        try {
          layer.plan(choice);
        } catch (const std::invalid_argument&) {
          continue;
        }
        alarm(kCaseSeconds);
        layer.forward(timer.stream());
        const PassTime forward = timer.time([&] { layer.launch_forward(timer.stream()); });
        const PassTime backward = timer.time([&] { layer.backward(timer.stream()); });
        std::printf("{\"case\": \"%s\"", progress.current.c_str());
        for (const auto& [name, time, plan] :
             {std::tuple{"forward", forward, &layer.forward_plan}, std::tuple{"backward", backward, &layer.backward_plan}}) {
          std::printf(
              ", \"%s\": {\"family\": \"%s\", \"stream_us\": %.3f, \"graph_us\": %.3f, \"host_us\": %.3f, \"model_us\": "
              "%.3f}",
              name, to_string(plan->family), time.stream / T, time.graph / T, time.host / T, plan->us_per_step);
        }
        std::printf("}\n");
        std::fflush(stdout);
      }
    }
  }
}

}  // namespace torch_free
