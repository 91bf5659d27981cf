// The persistent families of a formula: the products and norms of a block (formula_persistent_memory.cuh).
#pragma once
#include "cuda/formula/formula_exchange.cuh"

namespace fused_rnn::cuda {

template <class C, MathKind kMath, bool kBackward, bool kGrid>
struct FormulaPersistentBlock
    : std::conditional_t<kGrid, FormulaGridExchange<C, kMath, kBackward>, FormulaClusterExchange<C, kMath, kBackward>> {
  using Exchange =
      std::conditional_t<kGrid, FormulaGridExchange<C, kMath, kBackward>, FormulaClusterExchange<C, kMath, kBackward>>;
  using Memory = typename Exchange::Memory;
  using Exchange::Exchange;
  using Memory::atoms, Memory::vector_bytes, Memory::unit_of, Memory::count_of;
  using Memory::is_product, Memory::is_centred, Memory::level_of, Memory::place_of;
  using Memory::kRows, Memory::kWarps, Memory::kThreads, Memory::kAtom, Memory::kAtomElements, Memory::kChunk;
  using Memory::s, Memory::p, Memory::smem, Memory::rank;
  using typename Memory::Acc, typename Memory::Fragments, typename Memory::Moments;

  // ----------------------------------------------------------------------------------------------------------- products

  // The sums of `tasks` x 16 weight rows and all batch rows, each in `splits` parts of the K chunks, by the warps in turn.
  // find(task, matrix, vector): the task's first weight row, and the vector; chunk(c): the vector's chunk at the matrix's c.
  template <class Find, class Chunk>
  __device__ __forceinline__ void multiply(int tasks, int splits, int chunks, int rows, Find&& find, Chunk&& chunk) const {
    for (int work = simt::warp_id(); work < tasks * splits; work += kWarps) {
      const int task = work / splits, part = work % splits;
      const unsigned char *matrix, *vector;
      int row;
      find(task, matrix, row, vector);
      Acc sums[2][4] = {};
      const int end = chunks * (part + 1) / splits;
#pragma unroll 2
      for (int c = chunks * part / splits; c < end; ++c) {
        const unsigned char* const a = matrix + c * rows * kChunkBytes;
        const unsigned char* const b = vector + chunk(task, c) * (kRows * kChunkBytes);
#pragma unroll
        for (int k = 0; k < kChunk; k += Fragments::kStep) {
          Fragments::multiply(sums[k / Fragments::kStep % 2], Fragments::load_a(a, row, k), Fragments::load_b(b, 0, k));
        }
      }
      Acc* const to = this->template at<Acc>(s.sums) + work * kAtomElements;
#pragma unroll
      for (int i = 0; i < 4; ++i) to[Fragments::batch(i) * kAtom + Fragments::unit(i)] = sums[0][i] + sums[1][i];
    }
  }
  // The head of the group that an atom of the block belongs to; the last one for atoms of padding.
  __device__ __forceinline__ int head_of(int atom) const {
    const int head = (rank * s.slice + atom * kAtom) / s.head;
    return head < s.heads ? head : s.heads - 1;
  }
  __device__ __forceinline__ void multiply_recurrent(const unsigned char* vectors) const {
    const int chunks = s.head / kChunk, gates = kBackward ? 1 : C::kRecurrentGates;
    const auto find = [&](int task, const unsigned char*& matrix, int& row, const unsigned char*& vector) {
      matrix = smem + s.weights[0];
      row = task * kAtom;
      vector = vectors;
    };
    const auto chunk = [&](int task, int c) {
      const int of_head = head_of(task % atoms()) * chunks;
      if constexpr (!kBackward) return of_head + c;
      return c / chunks * (s.units / kChunk) + of_head + c % chunks;
    };
    multiply(gates * atoms(), s.splits[0], (kBackward ? C::kRecurrentGates : 1) * chunks, gates * s.slice, find, chunk);
  }
  // Where the matrix of a product of a level lies.
  template <int kLevel>
  __device__ __forceinline__ int matrix_of(int product) const {
    int offset = 0;
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      if constexpr (Memory::is_product(k) && Memory::level_of(k) == kLevel) {
        if (Memory::place_of(kLevel, k, true) == product) offset = this->s.weights[k + 1];
      }
    });
    return offset;
  }
  // The products of a level, all at once.
  template <int kLevel>
  __device__ __forceinline__ void multiply_level(const unsigned char* vectors) const {
    constexpr int kProducts = place_of(kLevel, C::kPhases, true);
    if constexpr (kProducts > 0) {
      const auto find = [&](int task, const unsigned char*& matrix, int& row, const unsigned char*& vector) {
        const int product = task / atoms();
        matrix = smem + matrix_of<kLevel>(product);
        row = task % atoms() * kAtom;
        vector = vectors + product * vector_bytes();
      };
      multiply(kProducts * atoms(), s.splits[kLevel + 1], s.units / kChunk, s.slice, find, [](int, int c) { return c; });
    }
  }
  // Of an element: product or gate `number` of those made last.
  __device__ __forceinline__ Acc sum(int number, int splits, const FormulaPersistentElement& e) const {
    const int atom = e.at / kAtomElements, within = e.at % kAtomElements;
    const Acc* const parts = this->template at<Acc>(s.sums) + (number * atoms() + atom) * splits * kAtomElements + within;
    Acc result = parts[0];
    for (int i = 1; i < splits; ++i) result += parts[i * kAtomElements];
    return result;
  }

  // -------------------------------------------------------------------------------------------------------------- norms

  __device__ __forceinline__ Moments* moments_of(unsigned char* norms, int norm, int of_rank) const {
    return reinterpret_cast<Moments*>(norms) + (norm * s.ranks + of_rank) * kRows;
  }
  __device__ __forceinline__ Moments& final_moments(int phase, int b) const {
    return this->template at<Moments>(s.moments)[phase * kRows + b];
  }

  // The sum of f(element) over the block's units of row b, in every lane of the warp.
  template <class F>
  __device__ __forceinline__ Acc sum_of_slice(int b, F&& f) const {
    Acc sum = Acc(0);
    for (int u = simt::lane_id(); u < s.slice; u += simt::kWarpSize) {
      int of_layer;
      if (!unit_of(rank * s.slice + u, of_layer)) continue;
      sum += f((u / kAtom * kRows + b) * kAtom + u % kAtom, u);
    }
    return sum_of_warp(sum);
  }
  // Moments of the block's units: mean, and the sum of squares about it in place of the scale. v(element, unit): what the
  // norm takes; d(element, unit): of backward, the gradient of what it gave times its weight. A warp takes a row. Then all
  // blocks have them.
  template <class V, class D>
  __device__ __forceinline__ void make_moments(unsigned char* norms, int norm, bool centred, int b, V&& v, D&& d) const {
    const int count = count_of(rank);
    Moments own{};
    if (centred && count > 0) own.mean = sum_of_slice(b, v) / static_cast<Acc>(count);
    own.scale = sum_of_slice(b, [&](int at, int u) {
      const Acc off = v(at, u) - own.mean;
      return off * off;
    });
    if constexpr (kBackward) {
      own.along = sum_of_slice(b, [&](int at, int u) { return d(at, u) * (v(at, u) - own.mean); });
      own.mean_d = sum_of_slice(b, d);
    }
    Moments* const place = moments_of(norms, norm, rank) + b;
    if (simt::lane_id() == 0) *place = own;
    simt::sync_warp();
    Exchange::send_moments(place);
  }
  // Those of all units, from those of the blocks.
  __device__ __forceinline__ Moments combined(unsigned char* norms, int norm, bool centred, int b) const {
    using namespace math;
    const Acc H = static_cast<Acc>(p.H);
    Moments all{};
    for (int r = 0; r < s.ranks; ++r) all.mean += static_cast<Acc>(count_of(r)) * moments_of(norms, norm, r)[b].mean;
    all.mean /= H;
    Acc squares = Acc(0);
    for (int r = 0; r < s.ranks; ++r) {
      const Moments part = moments_of(norms, norm, r)[b];
      const Acc off = part.mean - all.mean;
      squares += part.scale + static_cast<Acc>(count_of(r)) * off * off;
      if constexpr (kBackward) {
        all.along += part.along + part.mean_d * off;
        all.mean_d += part.mean_d;
      }
    }
    all.scale = Acc(1) / sqrt(squares / H + Acc(kFormulaNormEpsilon));
    all.along = all.along * all.scale / H;
    all.mean_d = centred ? all.mean_d / H : Acc(0);
    return all;
  }
  // A thread takes a norm and a row. Ends with a barrier.
  template <int kLevel>
  __device__ __forceinline__ void combine_level(unsigned char* norms) const {
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      if constexpr (!Memory::is_product(k) && Memory::level_of(k) == kLevel) {
        constexpr int kNorm = Memory::place_of(kLevel, k, false);
        const int b = simt::thread_x() - kNorm * Memory::kRows;
        if (b >= 0 && b < Memory::kRows) {
          this->final_moments(k, b) = this->combined(norms, kNorm, Memory::is_centred(k), b);
        }
      }
    });
    simt::sync_block();
  }

  // ------------------------------------------------------------------------------------------------------------- levels

  // The phases of a level, between two passes of `scan`, a class of this one, which sends its norms.
  template <int kLevel, class Scan>
  __device__ __forceinline__ void make_level(Scan& scan) {
    constexpr int kProducts = place_of(kLevel, C::kPhases, true), kNorms = place_of(kLevel, C::kPhases, false);
    unsigned char* const vectors = this->vectors_of_level(kLevel);
    unsigned char* const norms = this->norms_of_level(kLevel);
    if constexpr (kProducts > 0) this->send_vectors(vectors, kProducts);
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      if constexpr (!Memory::is_product(k) && Memory::level_of(k) == kLevel) scan.template send_norm<k>(norms);
    });
    if constexpr (kNorms > 0) simt::sync_block();
    this->await(kProducts, kNorms);
    multiply_level<kLevel>(vectors);
    if constexpr (kNorms > 0) {
      combine_level<kLevel>(norms);
    } else {
      simt::sync_block();
    }
  }
  // Each level, and the pass after it.
  template <class Scan, int... kLevel>
  __device__ __forceinline__ void make_levels(Scan& scan, int64_t step, std::integer_sequence<int, kLevel...>) {
    ((make_level<kLevel>(scan), scan.template pass<kLevel>(step)), ...);
  }
};

}  // namespace fused_rnn::cuda
