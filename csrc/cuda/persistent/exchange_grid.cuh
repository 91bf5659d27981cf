// How the blocks of a group hand each other the states of a step, one policy per family. A state is a word of a Chunk policy
// (persistent_math.cuh); `step` counts exchanges from 0, `row_tile` the row tiles of the group, `chunk` the chunks of K.
// Both policies use two buffers in turn. Two suffice: a block that publishes step s + 2 has received step s + 1 of every
// block of the group, and each of those blocks sent step s + 1 after all its warps had consumed step s.
//   Packet                                       what a lane gets of a chunk; words(packet) are its 2 words
//   begin(row_tile, step)                        before the first request
//   request(packet, row_tile, chunk, step)       asks without waiting
//   await(packet, row_tile, chunk, step)         waits; by the whole warp
//   publish(value, unit, b, row_tile, chunk0, step)  hands on one state; by all threads of whole warps
#pragma once
#include "cuda/persistent/persistent_math.cuh"

namespace fused_rnn::cuda {

// States go through global memory, that is L2. Every word carries the number of its step. A lane's two words are neighbours.
// Memory: [2][row tile][chunk][lane][2].
template <class Chunk>
struct GridExchange {
  static constexpr bool kCluster = false;
  struct Packet {
    simt::TaggedWord word[2];
  };

  simt::TaggedWord* words_;
  int row_tiles, chunks;

  __device__ __forceinline__ GridExchange(const PersistentLaunch& l, PersistentShape shape, int group)
      : words_(static_cast<simt::TaggedWord*>(l.exchange) +
               static_cast<int64_t>(group) * 2 * l.row_tiles * exchange_words(shape, l.slices)),
        row_tiles(l.row_tiles),
        chunks(chunk_count(shape, l.slices)) {}

  __device__ __forceinline__ void start() {}
  __device__ __forceinline__ void begin(int, uint32_t) {}
  static __device__ __forceinline__ uint32_t tag(uint32_t step) { return step + 1; }
  __device__ __forceinline__ simt::TaggedWord* fragment(int row_tile, int chunk, uint32_t step) const {
    return words_ + ((static_cast<int>(step & 1) * row_tiles + row_tile) * chunks + chunk) * 64;
  }

  __device__ __forceinline__ void request(Packet& packet, int row_tile, int chunk, uint32_t step) const {
    simt::load_tagged(packet.word, fragment(row_tile, chunk, step) + 2 * simt::lane_id());
  }
  __device__ __forceinline__ void await(Packet& packet, int row_tile, int chunk, uint32_t step) const {
    const auto missing = [&] { return packet.word[0].tag != tag(step) || packet.word[1].tag != tag(step); };
    while (simt::ballot(missing())) {
      if (missing()) request(packet, row_tile, chunk, step);
    }
  }
  static __device__ __forceinline__ void words(const Packet& packet, uint32_t (&x)[2]) {
    x[0] = packet.word[0].value;
    x[1] = packet.word[1].value;
  }

  // The state of one unit. With 16-bit types the lane of the even unit of a pair stores for both units.
  __device__ __forceinline__ void publish(float value, int unit, int b, int row_tile, int chunk0, uint32_t step) const {
    constexpr bool kPairs = Chunk::kStep == 16;
    const float other = kPairs ? simt::shuffle_xor(value, 1) : 0.0f;
    if (kPairs && unit % 2) return;
    const FragmentPlace place = Chunk::place(unit % Chunk::kStep, b);
    simt::store_tagged(fragment(row_tile, chunk0 + unit / Chunk::kStep, step) + 2 * place.lane + place.word,
                       {Chunk::pack(value, other), tag(step)});
  }
};

}  // namespace fused_rnn::cuda
