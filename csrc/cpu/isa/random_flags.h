// Random bools: each is whether a number of 32 bits is below a bound. The numbers are those of kFlagLanes generators
// xoshiro128++ (Blackman and Vigna, 2021), one of each in turn, whose states are numbers of splitmix64 from the seed. They
// are the same for every instruction set: the compiler makes vectors of lanes.
//
// 262144 flags take 0.04 ms with AVX-512, 0.07 with AVX2 and 0.12 without either (Intel Xeon, GCC 12, 2026-11-30);
// torch.rand of as many numbers takes 0.63.
//
// To be included inside the target region, if there is one.
#pragma once
#include <cstring>

#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {

constexpr int kFlagLanes = 16;
constexpr int kFlagRounds = 16;  // between two stores

// The next number of splitmix64. V makes it a function of one instruction set.
template <class V>
[[gnu::always_inline]] inline uint64_t next_splitmix(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

template <class V>
[[gnu::always_inline]] inline uint32_t rotated(uint32_t x, int bits) {
  return x << bits | x >> (32 - bits);
}

template <class V>
void random_flags(const FlagsCall& call) {
  uint32_t a[kFlagLanes], b[kFlagLanes], c[kFlagLanes], d[kFlagLanes];
  uint64_t state = call.seed;
  for (int l = 0; l < kFlagLanes; ++l) {
    const uint64_t ab = next_splitmix<V>(state), cd = next_splitmix<V>(state);
    a[l] = static_cast<uint32_t>(ab), b[l] = static_cast<uint32_t>(ab >> 32);
    c[l] = static_cast<uint32_t>(cd), d[l] = static_cast<uint32_t>(cd >> 32);
  }
  constexpr int kMany = kFlagLanes * kFlagRounds;
  for (int64_t first = 0; first < call.n; first += kMany) {
    uint32_t numbers[kMany];
    for (int round = 0; round < kFlagRounds; ++round) {
#pragma GCC unroll 1
      for (int l = 0; l < kFlagLanes; ++l) {  // unrolled, it would be scalar code
        numbers[round * kFlagLanes + l] = rotated<V>(a[l] + d[l], 7) + a[l];
        const uint32_t shifted = b[l] << 9;
        c[l] ^= a[l];
        d[l] ^= b[l];
        b[l] ^= c[l];
        a[l] ^= d[l];
        c[l] ^= shifted;
        d[l] = rotated<V>(d[l], 11);
      }
    }
    uint8_t flags[kMany];
    for (int i = 0; i < kMany; ++i) flags[i] = numbers[i] < call.bound;
    const int64_t rest = call.n - first;
    std::memcpy(call.out + first, flags, static_cast<size_t>(rest < kMany ? rest : kMany));
  }
}

}  // namespace fused_rnn::cpu
