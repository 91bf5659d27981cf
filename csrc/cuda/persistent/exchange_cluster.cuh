// The exchanges of family `cluster`: a block pushes into the shared memory of the others, and a barrier of the receiver
// counts the bytes. exchange_grid.cuh says what an exchange is. Barriers: [2][kMaxRowTiles].
#pragma once
#include "cuda/persistent/persistent_math.cuh"

namespace fused_rnn::cuda {

// The barriers of one block, one for each row tile and each of the two buffers.
struct ClusterBarriers {
  simt::MBarrier* barriers;
  int row_tiles;
  int ranks;       // blocks of the cluster
  int rank_bytes;  // that each of them sends to a block in an exchange; a constant of the kernel

  // A push is undefined in a cluster of one block. Such a block stores, and each thread that stores arrives at the barrier.
  __device__ __forceinline__ bool alone() const { return ranks == 1; }
  __device__ __forceinline__ int pushed_bytes() const { return alone() ? 0 : ranks * rank_bytes; }
  __device__ __forceinline__ simt::MBarrier* barrier(int row_tile, uint32_t step) const {
    return barriers + static_cast<int>(step & 1) * kMaxRowTiles + row_tile;
  }
  // The cluster meets, since all its barriers must be ready before the first push. It need not meet at the end: a block
  // awaits every push that is sent to it before it ends.
  __device__ __forceinline__ void start() {
    if (simt::thread_x() == 0) {
      for (int i = 0; i < 2 * row_tiles; ++i) {
        simt::mbarrier_init(barrier(i / 2, i), alone() ? 1 + rank_bytes / 16 : 1);
        simt::mbarrier_expect(barrier(i / 2, i), pushed_bytes());
      }
    }
    simt::sync_cluster();
  }

  // Awaits the exchange. One thread then announces the next phase of the same barrier.
  __device__ __forceinline__ void begin(int row_tile, uint32_t step) {
    simt::mbarrier_wait(barrier(row_tile, step), static_cast<int>(step >> 1 & 1));
    if (simt::thread_x() == 0) simt::mbarrier_expect(barrier(row_tile, step), pushed_bytes());
  }

  // Pushes 16 bytes into another block of the cluster. target: the place in this block's shared memory that has the same
  // offset there.
  __device__ __forceinline__ void send(uint32_t* target, const simt::Vec<uint32_t, 4>& piece, int rank, int row_tile,
                                       uint32_t step) const {
    simt::store_async(simt::map_to_rank(target, rank), piece.v, simt::map_to_rank(barrier(row_tile, step), rank));
  }
  // The same in a cluster of one block.
  __device__ __forceinline__ void keep(uint32_t* target, const simt::Vec<uint32_t, 4>& piece, int row_tile,
                                       uint32_t step) const {
    simt::store_vec(target, piece);
    simt::mbarrier_arrive(barrier(row_tile, step));
  }
};

// Every state goes to all blocks.
// Memory: [2][row tile][chunk][word][lane]; 16 bytes of it belong to one row and consecutive units.
template <class Chunk>
struct ClusterExchange : ClusterBarriers {
  static constexpr bool kCluster = true;
  struct Packet {
    uint32_t word[2];
  };

  uint32_t* states;
  int chunks;

  __device__ __forceinline__ ClusterExchange(const PersistentLaunch& l, PersistentShape shape, int) {
    const PersistentSmem smem = persistent_smem(shape, l.slices, l.row_tiles);
    barriers = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem() + smem.barriers);
    states = reinterpret_cast<uint32_t*>(simt::dynamic_smem() + smem.exchange);
    row_tiles = l.row_tiles;
    chunks = chunk_count(shape, l.slices);
    ranks = l.slices;
    rank_bytes = chunk_count(shape, 1) * 256;
  }

  __device__ __forceinline__ uint32_t* fragment(int row_tile, int chunk, uint32_t step) const {
    return states + ((static_cast<int>(step & 1) * row_tiles + row_tile) * chunks + chunk) * 64;
  }
  __device__ __forceinline__ void request(Packet& packet, int row_tile, int chunk, uint32_t step) const {
    const uint32_t* words = fragment(row_tile, chunk, step) + simt::lane_id();
    packet.word[0] = words[0];
    packet.word[1] = words[32];
  }
  __device__ __forceinline__ void await(Packet&, int, int, uint32_t) const {}
  static __device__ __forceinline__ void words(const Packet& packet, uint32_t (&x)[2]) {
    x[0] = packet.word[0];
    x[1] = packet.word[1];
  }

  // The state of one unit. The lanes whose units fill 16 bytes gather these bytes; each of the lanes pushes them to some of
  // the blocks.
  __device__ __forceinline__ void publish(float value, int unit, int b, int row_tile, int chunk0, uint32_t step) const {
    constexpr int kLanes = Chunk::kStep == 16 ? 8 : 4, kPerWord = kLanes / 4;
    const float other = kPerWord == 2 ? simt::shuffle_xor(value, 1) : 0.0f;
    const uint32_t word = Chunk::pack(value, other);
    const unsigned lane = simt::lane_id(), first = lane / kLanes * kLanes;
    simt::Vec<uint32_t, 4> piece;
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.v[i] = simt::shuffle(word, first + i * kPerWord);
    const unsigned unit0 = static_cast<unsigned>(unit) / kLanes * kLanes;
    const FragmentPlace place = Chunk::place(unit0 % Chunk::kStep, b);
    uint32_t* target = fragment(row_tile, chunk0 + unit0 / Chunk::kStep, step) + place.word * 32 + place.lane;
    if (alone()) {
      if (lane % kLanes == 0) keep(target, piece, row_tile, step);
      return;
    }
#pragma unroll
    for (int i = 0; i < kMaxClusterBlocks / kLanes; ++i) {
      const int rank = static_cast<int>(lane % kLanes) + i * kLanes;
      if (rank < ranks) send(target, piece, rank, row_tile, step);
    }
  }
};

// Partial sums go to the blocks that own their units.
// Memory: [2][row tile][block that sent][row][unit of the slice] floats.
struct ClusterScatter : ClusterBarriers {
  float* sums;
  int floats;  // of one block's sums for one row tile

  __device__ __forceinline__ ClusterScatter(const PersistentLaunch& l, PersistentShape shape) {
    const PersistentSmem smem = persistent_smem(shape, l.slices, l.row_tiles);
    barriers = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem() + smem.barriers);
    sums = reinterpret_cast<float*>(simt::dynamic_smem() + smem.exchange);
    row_tiles = l.row_tiles;
    ranks = l.slices;
    rank_bytes = scatter_floats(shape, 1) * 4;
    floats = kTileRows * slice_units(shape);
  }

  __device__ __forceinline__ float* received(int row_tile, uint32_t step) const {
    return sums + (static_cast<int>(step & 1) * row_tiles + row_tile) * ranks * floats;
  }
  // Place: row * units of a slice + unit.
  __device__ __forceinline__ void push(const RowPiece& piece, int to, int place, int from, int row_tile,
                                       uint32_t step) const {
    simt::Vec<uint32_t, 4> words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.v[i] = simt::float_bits(piece.v[i]);
    auto* target = reinterpret_cast<uint32_t*>(received(row_tile, step) + from * floats + place);
    alone() ? keep(target, words, row_tile, step) : send(target, words, to, row_tile, step);
  }
  // The sum over all blocks, in their order. Even and odd blocks are added apart, so that two chains of additions run side
  // by side.
  __device__ __forceinline__ float sum(int place, int row_tile, uint32_t step) const {
    const float* from = received(row_tile, step) + place;
    return ranks > 8 ? sum_of<kMaxClusterBlocks>(from) : ranks > 4 ? sum_of<8>(from) : sum_of<4>(from);
  }

 private:
  // The sum over at most kMost blocks. Four loads at a time are under way together.
  template <int kMost>
  __device__ __forceinline__ float sum_of(const float* from) const {
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int first = 0; first < kMost; first += 4) {
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = first + i < ranks ? from[(first + i) * floats] : 0.0f;
      even = (even + v[0]) + v[2];
      odd = (odd + v[1]) + v[3];
    }
    return even + odd;
  }
};

}  // namespace fused_rnn::cuda
