// From one launch to the next: kLaunchUs and kOverlappedLaunchUs of csrc/plan/machine.h, for a kernel that does nothing but
// what the step kernels do for programmatic dependent launch (PDL). In a stream and replayed from a CUDA graph, with and
// without PDL, on one block and on a block for every SM.
#include <chrono>

#include "micro.cuh"

namespace {

using namespace micro;

constexpr int kLaunches = 500;  // fewer than a stream queues: the host does not wait

struct Step {
  int* memory;
};

__global__ void __launch_bounds__(256) step_kernel(const Step p) {
  simt::pdl_wait();
  simt::pdl_launch_dependents();
  if (p.memory && simt::thread_x() == 0) p.memory[simt::block_x()] += 1;
}

void launch_all(const Step& step, int blocks, bool pdl, cudaStream_t stream) {
  for (int i = 0; i < kLaunches; ++i) {
    simt::launch(step_kernel, {"step", blocks, 1, 1, 256, 0, 1, pdl && i > 0, false}, stream, step);
  }
}

// Microseconds of a launch, by events around all; the median of a few times, the first left out.
template <class F>
double us_per_launch(cudaStream_t stream, F&& all) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> us;
  for (int i = 0; i < 8; ++i) {
    check(cudaEventRecord(begin, stream), "event");
    all();
    check(cudaEventRecord(end, stream), "event");
    check(cudaEventSynchronize(end), "kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i) us.push_back(milliseconds * 1e3 / kLaunches);
  }
  std::sort(us.begin(), us.end());
  return us[us.size() / 2];
}

double us_in_graph(const Step& step, int blocks, bool pdl, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  launch_all(step, blocks, pdl, stream);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  const double us = us_per_launch(stream, [&] { check(cudaGraphLaunch(executable, stream), "graph"); });
  check(cudaGraphExecDestroy(executable), "graph");
  check(cudaGraphDestroy(graph), "graph");
  return us;
}

void measure() {
  const fused_rnn::DeviceInfo device = simt::query_device(0);
  const Step step{device_array<int>(device.sm_count)};
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  for (int blocks : {1, device.sm_count}) {
    for (bool pdl : {false, true}) {
      if (pdl && device.compute_capability < 90) continue;
      const std::string parameters = number("blocks", blocks) + ", \"pdl\": " + (pdl ? "true" : "false");
      report("launch_stream", parameters, us_per_launch(stream, [&] { launch_all(step, blocks, pdl, stream); }), "us",
             pdl ? "kOverlappedLaunchUs" : "kLaunchUs");
      report("launch_graph", parameters, us_in_graph(step, blocks, pdl, stream), "us", "");
      const auto start = std::chrono::steady_clock::now();
      launch_all(step, blocks, pdl, stream);
      const std::chrono::duration<double, std::micro> host = std::chrono::steady_clock::now() - start;
      check(cudaStreamSynchronize(stream), "kernel");
      report("launch_host", parameters, host.count() / kLaunches, "us", "");
    }
  }
}

}  // namespace

int main() { return micro::run(75, measure); }
