// How the blocks of a team hand each other their parts of vectors and their moments, one class for each persistent family.
// A block makes its part where it lies in shared memory, sends it, and awaits the parts of the others at their places there.
//   start()                    weights, constants and the exchange's own memory are ready in the block
//   meet()                     after it every block may send
//   send_vectors(first, count) the block's part of vectors that lie one behind the other, after a barrier of the block
//   send_moments(place)        the moments of one norm and row that lie there; by a warp that has written them
//   await(vectors, norms)      all parts are there, for all threads; the exchange's number is then the next one's
// Alone in its team, a block exchanges nothing.
#pragma once
#include "cuda/formula/formula_persistent_memory.cuh"

namespace fused_rnn::cuda {

// Family `cluster`: a block pushes into the shared memory of the others. Number i counts its bytes at barrier i % 2.
template <class C, MathKind kMath, bool kBackward>
struct FormulaClusterExchange : FormulaPersistentMemory<C, kMath, kBackward> {
  using Memory = FormulaPersistentMemory<C, kMath, kBackward>;
  using Memory::kRows, Memory::kSize, Memory::kThreads;
  using Memory::s, Memory::rank, Memory::exchange;
  using typename Memory::Moments;

  __device__ __forceinline__ FormulaClusterExchange(const FormulaLayer& layer, const FormulaPersistentShape& shape,
                                                    const FormulaTeams& teams)
      : Memory(layer, shape, formula_team(shape, teams)) {}

  __device__ __forceinline__ simt::MBarrier* barrier(uint32_t number) const {
    return this->template at<simt::MBarrier>(s.barriers) + static_cast<int>(number & 1);
  }
  __device__ __forceinline__ void start() const {
    if (s.ranks > 1 && simt::thread_x() < 2) simt::mbarrier_init(barrier(simt::thread_x()));
    Memory::start();
  }
  __device__ __forceinline__ void meet() const {
    if (s.ranks > 1) {
      simt::sync_cluster();
    } else {
      simt::sync_block();
    }
  }

  // 16 bytes to the same place of another block; to the block itself: nothing.
  __device__ __forceinline__ void push(const unsigned char* place, int to) const {
    if (to == rank) return;
    const auto piece = simt::load_vec<4>(reinterpret_cast<const uint32_t*>(place));
    simt::store_async(simt::map_to_rank(place, to), piece.v, simt::map_to_rank(barrier(exchange), to));
  }
  // A thread takes pieces of 16 bytes, each to one other block.
  __device__ __forceinline__ void send_vectors(const unsigned char* first, int vectors) const {
    if (s.ranks == 1) return;
    const int pieces = this->own_pieces();
    for (int i = simt::thread_x(); i < pieces * vectors * s.ranks; i += kThreads) {
      const int number = i / s.ranks;
      push(first + number / pieces * this->vector_bytes() + this->own_piece(number % pieces), i % s.ranks);
    }
  }
  __device__ __forceinline__ void send_moments(const Moments* place) const {
    if (s.ranks == 1) return;
    constexpr int kPieces = static_cast<int>(sizeof(Moments)) / 16;
    for (int i = simt::lane_id(); i < kPieces * s.ranks; i += simt::kWarpSize) {
      push(reinterpret_cast<const unsigned char*>(place) + 16 * (i % kPieces), i / kPieces);
    }
  }
  // sent: the others have sent something.
  __device__ __forceinline__ void await(int vectors, int norms, bool sent = true) {
    if (s.ranks > 1) {
      const int others = s.units - this->units_of(rank);
      const int bytes = vectors * others * kRows * kSize + norms * (s.ranks - 1) * kRows * static_cast<int>(sizeof(Moments));
      if (simt::thread_x() == 0) simt::mbarrier_expect(barrier(exchange), sent ? bytes : 0);
      simt::mbarrier_wait(barrier(exchange), static_cast<int>(exchange >> 1 & 1));
    }
    ++exchange;
  }
};

// Family `grid`: through global memory, that is L2, where every word carries the number of its exchange. The words of a team
// lie there as they lie in the blocks' memory for exchanges. A block sends number i only after it has received number i - 1
// of all blocks, which had received number i - 2 before they sent that; so it may write where number i - 2 lies.
template <class C, MathKind kMath, bool kBackward>
struct FormulaGridExchange : FormulaPersistentMemory<C, kMath, kBackward> {
  using Memory = FormulaPersistentMemory<C, kMath, kBackward>;
  using Memory::kRows, Memory::kSize, Memory::kThreads, Memory::kChunk;
  using Memory::s, Memory::smem, Memory::rank, Memory::exchange;
  using typename Memory::Moments;
  static constexpr int kBatch = 4;  // pieces that a thread has under way

  simt::TaggedWord* const words_;  // of the team

  __device__ __forceinline__ FormulaGridExchange(const FormulaLayer& layer, const FormulaPersistentShape& shape,
                                                 const FormulaTeams& teams)
      : FormulaGridExchange(layer, shape, teams, formula_team(shape, teams)) {}
  __device__ __forceinline__ FormulaGridExchange(const FormulaLayer& layer, const FormulaPersistentShape& shape,
                                                 const FormulaTeams& teams, const FormulaTeam& team)
      : Memory(layer, shape, team),
        words_(static_cast<simt::TaggedWord*>(teams.words) +
               static_cast<int64_t>(team.number) * (formula_exchange_bytes(shape) / 4)) {}

  __device__ __forceinline__ void meet() const { simt::sync_block(); }

  __device__ __forceinline__ simt::TaggedWord* words_of(const unsigned char* place) const {
    return words_ + static_cast<int>(place - (smem + s.vectors)) / 4;
  }
  // 16 bytes of the block.
  __device__ __forceinline__ void publish(const unsigned char* place) const {
    const auto piece = simt::load_vec<4>(reinterpret_cast<const uint32_t*>(place));
    simt::TaggedWord* const to = words_of(place);
#pragma unroll
    for (int i = 0; i < 4; ++i) simt::store_tagged(to + i, {piece.v[i], exchange + 1});
  }
  __device__ __forceinline__ void send_vectors(const unsigned char* first, int vectors) const {
    if (s.ranks == 1) return;
    const int pieces = this->own_pieces();
    for (int i = simt::thread_x(); i < pieces * vectors; i += kThreads) {
      publish(first + i / pieces * this->vector_bytes() + this->own_piece(i % pieces));
    }
  }
  __device__ __forceinline__ void send_moments(const Moments* place) const {
    if (s.ranks == 1) return;
    constexpr int kPieces = static_cast<int>(sizeof(Moments)) / 16;
    if (simt::lane_id() < kPieces) publish(reinterpret_cast<const unsigned char*>(place) + 16 * simt::lane_id());
  }

  // Copies what other blocks have sent to its places. place_of(i): where piece i of `pieces` lies, or null: the block's own.
  template <class PlaceOf>
  __device__ __forceinline__ void receive(int pieces, PlaceOf&& place_of) const {
    const auto request = [](simt::TaggedWord(&words)[2][2], const simt::TaggedWord* from) {
      simt::load_tagged(words[0], from);
      simt::load_tagged(words[1], from + 2);
    };
    const auto missing = [this](const simt::TaggedWord(&words)[2][2]) {
      const uint32_t tag = exchange + 1;
      return words[0][0].tag != tag || words[0][1].tag != tag || words[1][0].tag != tag || words[1][1].tag != tag;
    };
#pragma unroll 1
    for (int first = simt::thread_x(); first < pieces; first += kBatch * kThreads) {
      simt::TaggedWord words[kBatch][2][2];
      unsigned char* places[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = first + i * kThreads;
        places[i] = piece < pieces ? place_of(piece) : nullptr;
        if (places[i]) request(words[i], words_of(places[i]));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (!places[i]) continue;
        while (missing(words[i])) request(words[i], words_of(places[i]));
        simt::Vec<uint32_t, 4> values;
#pragma unroll
        for (int j = 0; j < 4; ++j) values.v[j] = words[i][j / 2][j % 2].value;
        simt::store_vec(reinterpret_cast<uint32_t*>(places[i]), values);
      }
    }
  }
  __device__ __forceinline__ void await(int vectors, int norms, bool sent = true) {
    if (s.ranks > 1 && sent) {
      constexpr int kUnits = 16 / kSize, kOfRow = kChunkBytes / 16, kOfMoments = static_cast<int>(sizeof(Moments)) / 16;
      const int first = rank * s.slice, end = first + s.slice, of_vector = s.units / kUnits * kRows;
      // Neighbouring threads take neighbouring pieces of a chunk.
      receive(vectors * of_vector, [&](int i) -> unsigned char* {
        const int within = i % of_vector, chunk = within / (kOfRow * kRows), b = within / kOfRow % kRows;
        const int piece = within % kOfRow, unit = chunk * kChunk + piece * kUnits;
        if (unit >= first && unit < end) return nullptr;
        return this->vectors_of(exchange, vectors) + i / of_vector * this->vector_bytes() + chunk * (kRows * kChunkBytes) +
               k_major_offset(b, piece * 16);
      });
      receive(norms * s.ranks * kRows * kOfMoments, [&](int i) -> unsigned char* {
        if (i / (kRows * kOfMoments) % s.ranks == rank) return nullptr;
        return this->norms_of(exchange, norms) + 16 * i;
      });
      simt::sync_block();
    }
    ++exchange;
  }
};

}  // namespace fused_rnn::cuda
