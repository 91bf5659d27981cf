// A hash of memory, at about the speed of reading it. It tells whether weights are still those of the call before. Keys are
// random for each process, so that no kind of change is more likely to go unseen than another.
//
// The hash of a block of kHashBlock bytes is a sum over pairs of its words, of (word + key)(other word + other key), with
// keys for every place in the block (NH; Black et al., UMAC, 1999). Two blocks that differ have the same sum with a
// probability of at most 2^-b, with b the bits of a word. Registers sum products of words of 64 bits. AVX2 and AVX-512 sum
// products of words of 32 bits, and beside them the words themselves: a change of one word goes unseen with a probability of
// 2^-64, a change of several words whose sum stays the same with at most 2^-32. The sums of the blocks are mixed one after
// the other.
//
// To be included inside the target region, if there is one.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {

__extension__ typedef unsigned __int128 Uint128;

// Both halves of a product in one word: every bit of the factors reaches every bit of the result. V makes it a function of
// one instruction set.
template <class V>
[[gnu::always_inline]] inline uint64_t fold(uint64_t a, uint64_t b) {
  const Uint128 product = static_cast<Uint128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// The state of a hash in registers, for instruction sets whose vectors have none (V::Hash).
template <class V>
struct RegisterHash {
  static constexpr int kStripe = 64;
  uint64_t mixed;

  [[gnu::always_inline]] inline RegisterHash(const HashKeys&, uint64_t before) : mixed(before) {}
  // `stripes` of kStripe bytes, at most a block.
  [[gnu::always_inline]] inline void add(const HashKeys& keys, const char* from, int64_t stripes) {
    constexpr int kWords = kStripe / 8;
    Uint128 sums[2] = {0, 0};
    for (int64_t s = 0; s < stripes; ++s) {
      uint64_t words[kWords];
      std::memcpy(words, from + s * kStripe, kStripe);
      const uint64_t* const key = keys.words + s * kWords;
      for (int i = 0; i < kWords; i += 2)
        sums[i / 2 % 2] += static_cast<Uint128>(words[i] + key[i]) * (words[i + 1] + key[i + 1]);
    }
    const Uint128 sum = sums[0] + sums[1];
    mixed = fold<V>(mixed ^ static_cast<uint64_t>(sum) ^ keys.mix[0], static_cast<uint64_t>(sum >> 64) ^ keys.mix[1]);
  }
  [[gnu::always_inline]] inline uint64_t result(const HashKeys&) const { return mixed; }
};

template <class V, class = void>
struct HashOf {
  using State = RegisterHash<V>;
};
template <class V>
struct HashOf<V, std::void_t<typename V::Hash>> {
  using State = typename V::Hash;
};

// The hash of `bytes` at `data`, after data whose hash is `before`.
template <class V>
uint64_t content_hash(const HashKeys& keys, const void* data, int64_t bytes, uint64_t before) {
  using State = typename HashOf<V>::State;
  State state(keys, before);
  const char* from = static_cast<const char*>(data);
  for (; bytes >= kHashBlock; bytes -= kHashBlock, from += kHashBlock) state.add(keys, from, kHashBlock / State::kStripe);
  const int64_t whole = bytes / State::kStripe;
  if (whole > 0) state.add(keys, from, whole);
  if (const int64_t rest = bytes - whole * State::kStripe; rest > 0) {
    char padded[State::kStripe] = {};
    std::memcpy(padded, from + whole * State::kStripe, static_cast<size_t>(rest));
    state.add(keys, padded, 1);
  }
  return state.result(keys);
}

}  // namespace fused_rnn::cpu
