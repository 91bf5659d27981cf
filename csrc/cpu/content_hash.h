// A hash of what lies in memory, at about the speed of reading it: to tell that weights are those of the call before. Every step is one
// to one in the state and in the word, as in FNV: a change of one word always changes the hash, any other goes unseen once in 2^64 times.
// Include inside the target region, if any.
#pragma once
#include <cstring>

#include "kernels.h"

namespace fused_rnn::cpu {

// Of `bytes` at `data`, after what `before` stands for. V: each instruction set has its own.
template <class V>
uint64_t content_hash(const void* data, int64_t bytes, uint64_t before) {
  // Independent chains hide the latency of the product: four vectors of AVX-512, which alone has it, or eight registers.
  constexpr bool kVectors = sizeof(V) == 64;
  constexpr int kLanes = kVectors ? 32 : 8, kStripe = kLanes * 8;
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15, kOdd = 0xc2b2ae3d27d4eb4f;
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = kOdd * static_cast<uint64_t>(2 * i + 1);
  const auto add = [&lanes](const char* from) __attribute__((always_inline)) {
    uint64_t words[kLanes];
    std::memcpy(words, from, kStripe);
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product = (lanes[i] ^ words[i]) * kGolden;
      lanes[i] = product << 29 | product >> 35;
      if constexpr (!kVectors)
        asm("" : "+r"(lanes[i]));  // GCC makes a vector product of many instructions of it, at a third of the speed
    }
  };
  const char* p = static_cast<const char*>(data);
  int64_t at = 0;
  for (; at + kStripe <= bytes; at += kStripe) add(p + at);
  if (at < bytes) {
    char rest[kStripe] = {};
    std::memcpy(rest, p + at, static_cast<size_t>(bytes - at));
    add(rest);
  }
  uint64_t hash = before;
  for (uint64_t lane : lanes) {
    hash = (hash ^ lane) * kOdd;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace fused_rnn::cpu
