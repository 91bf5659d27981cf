// Where the arrays of a workspace lie.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fused_rnn::cpu {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

#ifdef __SANITIZE_ADDRESS__
// Under AddressSanitizer a gap follows every array. Touching the gap, or the padding before it, is an error.
constexpr int64_t kArenaGap = 128;
inline void guard_array(char* array, int64_t bytes, int64_t with_gap) {
  __asan_unpoison_memory_region(array, static_cast<size_t>(bytes));
  __asan_poison_memory_region(array + bytes, static_cast<size_t>(with_gap - bytes));
}
#else
constexpr int64_t kArenaGap = 0;
inline void guard_array(char*, int64_t, int64_t) {}
#endif

// Lays arrays out one after the other from a base address, each aligned to 64 bytes; with a null base it only counts bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class E>
  E* take(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(E)), with_gap = round_up(bytes, 64) + kArenaGap;
    char* at = base_ ? base_ + used_ : nullptr;
    if (at) guard_array(at, bytes, with_gap);
    used_ += with_gap;
    return reinterpret_cast<E*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fused_rnn::cpu
