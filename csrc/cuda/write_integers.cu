#include <algorithm>
#include <launch.cuh>
#include <simt.cuh>

#include "cuda/backend.h"

namespace fused_rnn::cuda {
namespace {

constexpr int kIntegers = 500;  // of a launch, whose arguments are 4096 bytes at most
constexpr int kThreads = 512;

struct Integers {
  int64_t* to;
  int64_t count;
  int64_t values[kIntegers];
};
static_assert(sizeof(Integers) <= 4096 && kIntegers <= kThreads);

__global__ void __launch_bounds__(kThreads) write_integers_kernel(const Integers integers) {
  const int i = simt::thread_x();
  if (i < integers.count) integers.to[i] = integers.values[i];
}

}  // namespace

void write_integers(int64_t* to, const int64_t* integers, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kIntegers) {
    Integers arguments{to + first, std::min<int64_t>(kIntegers, count - first), {}};
    std::copy_n(integers + first, arguments.count, arguments.values);
    simt::launch(write_integers_kernel, {"write_integers", 1, 1, 1, kThreads, 0, 1, false, false}, stream, arguments);
  }
}

}  // namespace fused_rnn::cuda
