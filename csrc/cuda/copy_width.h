// How wide copies between rows of memory may be.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace fused_rnn::cuda {

// The most bytes (16, 4 or one element) that one access may copy. addresses: where rows begin, nulls included; row_bytes:
// the bitwise or of all distances between rows and of their lengths.
inline int copy_width(std::initializer_list<const void*> addresses, int64_t row_bytes, int element_bytes) {
  uint64_t bits = static_cast<uint64_t>(row_bytes);
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  if (bits % 16 == 0) return 16;
  return bits % 4 == 0 && element_bytes < 4 ? 4 : element_bytes;
}

}  // namespace fused_rnn::cuda
