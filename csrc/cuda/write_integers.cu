// Integers and flags of the host in device memory, as arguments of launches. A launch has 4096 bytes of arguments at most.
#include <algorithm>
#include <launch.cuh>
#include <simt.cuh>

#include "cuda/backend.h"

namespace fused_rnn::cuda {
namespace {

constexpr int kIntegers = 500;  // of a launch
constexpr int kFlagWords = 1000, kFlags = 32 * kFlagWords;
constexpr int kThreads = 512;

struct Integers {
  int64_t* to;
  int64_t count;
  int64_t values[kIntegers];
};
static_assert(sizeof(Integers) <= 4096 && kIntegers <= kThreads);

struct Flags {
  bool* to;
  int64_t count;
  uint32_t words[kFlagWords];  // flag i: bit i % 32 of word i / 32; a thread writes eight flags in a row
};
static_assert(sizeof(Flags) <= 4096);

__global__ void __launch_bounds__(kThreads) write_integers_kernel(const Integers integers) {
  const int i = simt::thread_x();
  if (i < integers.count) integers.to[i] = integers.values[i];
}

__global__ void __launch_bounds__(kThreads) write_flags_kernel(const Flags flags) {
  const auto count = static_cast<int>(flags.count);
  for (int first = 8 * simt::thread_x(); first < count; first += 8 * kThreads) {
    for (int i = first; i < first + 8 && i < count; ++i) flags.to[i] = (flags.words[i / 32] >> i % 32 & 1) != 0;
  }
}

}  // namespace

void write_integers(int64_t* to, const int64_t* integers, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kIntegers) {
    Integers arguments{to + first, std::min<int64_t>(kIntegers, count - first), {}};
    std::copy_n(integers + first, arguments.count, arguments.values);
    simt::launch(write_integers_kernel, {"write_integers", 1, 1, 1, kThreads, 0, 1, false, false}, stream, arguments);
  }
}

void write_flags(bool* to, const bool* flags, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kFlags) {
    Flags arguments{to + first, std::min<int64_t>(kFlags, count - first), {}};
    for (int64_t i = 0; i < arguments.count; ++i) arguments.words[i / 32] |= uint32_t{flags[first + i]} << i % 32;
    simt::launch(write_flags_kernel, {"write_flags", 1, 1, 1, kThreads, 0, 1, false, false}, stream, arguments);
  }
}

}  // namespace fused_rnn::cuda
