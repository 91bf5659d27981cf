// Shared by the microbenchmarks: each is a program of its own that measures constants of the planner's cost model with the
// same wrappers as the kernels (csrc/cuda/device/simt.cuh) and prints a line of JSON for each figure. No torch.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <launch.cuh>
#include <simt.cuh>
#include <string>
#include <ticks.cuh>
#include <vector>

namespace micro {

using fused_rnn::simt::check;
namespace simt = fused_rnn::simt;

// Device memory, zeroed; a benchmark keeps it to its end.
template <class T>
T* device_array(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "device memory");
  check(cudaMemset(memory, 0, count * sizeof(T)), "device memory");
  return static_cast<T*>(memory);
}

inline Ticks fetch(const Ticks* from) {
  Ticks ticks;
  check(cudaMemcpy(&ticks, from, sizeof ticks, cudaMemcpyDeviceToHost), "kernel");
  return ticks;
}

// Runs `launch` a few times after a warm-up; the median by the clock that measured in nanoseconds.
template <class F>
Ticks median_of_launches(const Ticks* result, F&& launch) {
  constexpr int kLaunches = 7;
  std::vector<Ticks> all;
  for (int i = 0; i <= kLaunches; ++i) {
    launch();
    check(cudaDeviceSynchronize(), "kernel");
    if (i) all.push_back(fetch(result));
  }
  std::sort(all.begin(), all.end(), [](const Ticks& a, const Ticks& b) { return a.nanoseconds < b.nanoseconds; });
  return all[kLaunches / 2];
}

// One line: what was measured, its parameters (a JSON fragment such as "\"cluster\": 4"), the figure with its unit, and the
// constant of the cost model that it stands for ("" if none).
inline void report(const char* benchmark, const std::string& parameters, double value, const char* unit,
                   const char* constant) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device 0");
  std::printf("{\"benchmark\": \"%s\", %s%s\"value\": %.6g, \"unit\": \"%s\", \"constant\": \"%s\", \"device\": \"%s\"}\n",
              benchmark, parameters.c_str(), parameters.empty() ? "" : ", ", value, unit, constant, properties.name);
  std::fflush(stdout);
}

inline std::string number(const char* name, long long value) {
  return std::string("\"") + name + "\": " + std::to_string(value);
}
inline std::string word(const char* name, const char* value) { return std::string("\"") + name + "\": \"" + value + "\""; }

// Every main: 0 if all was measured, 2 on a device that lacks what the benchmark is about, 1 on an error.
inline int run(int needed_capability, void (*measure)()) {
  try {
    const fused_rnn::DeviceInfo device = simt::query_device(0);
    if (device.compute_capability < needed_capability) {
      std::fprintf(stderr, "needs compute capability %d, the device has %d\n", needed_capability, device.compute_capability);
      return 2;
    }
    measure();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace micro
