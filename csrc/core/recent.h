// What was made for the latest keys.
#pragma once
#include <array>
#include <cstddef>
#include <optional>
#include <utility>

namespace fused_rnn {

// A short list that is searched; the oldest entry makes room. Not for use by two threads.
template <class Key, class Value, size_t kCount>
class Recent {
 public:
  // The value of a key, by make() if it is not among those kept. Valid until kCount others have been made.
  template <class Make>
  const Value& get(const Key& key, const Make& make) {
    for (const auto& entry : entries_) {
      if (entry && entry->first == key) return entry->second;
    }
    auto& entry = entries_[oldest_];
    entry.emplace(key, make());
    oldest_ = (oldest_ + 1) % kCount;
    return entry->second;
  }

 private:
  std::array<std::optional<std::pair<Key, Value>>, kCount> entries_;
  size_t oldest_ = 0;
};

}  // namespace fused_rnn
