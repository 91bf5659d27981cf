// How rows and other things are divided.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fused_rnn::cpu {

// `count` things over `parts`, as evenly as possible: part i has [share_begin(i), share_begin(i + 1)).
constexpr int64_t share_begin(int64_t count, int64_t parts, int64_t i) { return count * i / parts; }

// Calls f(first_row, rows) for balanced blocks of at most `most` of n rows.
template <class F>
void for_row_blocks(int64_t n, int most, F&& f) {
  const int64_t blocks = (n + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t begin = share_begin(n, blocks, i);
    f(begin, static_cast<int>(share_begin(n, blocks, i + 1) - begin));
  }
}

// Calls f(first_row, rows) for blocks of `most` of n rows, and the rest.
template <class F>
void for_blocks(int64_t n, int64_t most, F&& f) {
  for (int64_t begin = 0; begin < n; begin += most) f(begin, std::min(most, n - begin));
}

}  // namespace fused_rnn::cpu
