// How rows and other things are divided.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fused_rnn::cpu {

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// `count` things in `shares` shares, as even as possible: share i is [share_begin(i), share_begin(i + 1)).
constexpr int64_t share_begin(int64_t count, int64_t shares, int64_t i) { return count * i / shares; }

// Things [first, last).
struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
};
constexpr Range share_of(int64_t count, int64_t shares, int64_t i) {
  return {share_begin(count, shares, i), share_begin(count, shares, i + 1)};
}

// Calls f(first_row, rows) for blocks of n rows, of even size and at most `most`.
template <class F>
void for_row_blocks(int64_t n, int most, F&& f) {
  const int64_t blocks = ceil_div(n, most);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto [begin, end] = share_of(n, blocks, i);
    f(begin, static_cast<int>(end - begin));
  }
}

// Calls f(first_row, rows) for blocks of n rows, all of `most` rows but the last.
template <class F>
void for_blocks(int64_t n, int64_t most, F&& f) {
  for (int64_t begin = 0; begin < n; begin += most) f(begin, std::min(most, n - begin));
}

}  // namespace fused_rnn::cpu
