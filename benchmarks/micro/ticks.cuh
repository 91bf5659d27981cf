// Clocks for the microbenchmarks. tests/simt/include has a host twin, so that the kernels run in the simulator too.
#pragma once

namespace micro {

// What one thread measured around its loop.
struct Ticks {
  long long clocks;
  unsigned long long nanoseconds;
};

__device__ __forceinline__ unsigned long long nanoseconds() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
__device__ __forceinline__ Ticks now() { return {clock64(), nanoseconds()}; }
__device__ __forceinline__ void store_elapsed(Ticks* to, Ticks start) {
  const Ticks end = now();
  *to = {end.clocks - start.clocks, end.nanoseconds - start.nanoseconds};
}

}  // namespace micro
