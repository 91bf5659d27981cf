// The persistent families of a formula, `cluster` and `grid`: one launch makes all steps of a layer. What lies where in a
// block's memory, and the begin. Who owns which units: plan/formula_persistent_shape.h. How the blocks of a team hand each
// other what they made: formula_exchange.cuh.
//
// A block holds its rows of all weights, the states of its elements (unit, row) and what a step leaves between its parts in
// shared memory. A thread owns the same elements throughout. A product reads a vector of all the group's units per row, of
// which every block makes a part. A norm reads moments of all blocks.
//   vector   [K chunk][row][kChunkBytes], a matrix [K chunk][weight row][kChunkBytes], pieces permuted (fragments.cuh)
//   element  [atom][row][unit of the atom]; sums of products the same, [product, gate and atom][part of K][row][unit]
// Exchanges are numbered through all steps. Number i lies at the begin or the end of the memory for exchanges, where number
// i - 2 lay: all blocks have read that, since each of them sends number i - 1 after it.
#pragma once
#include "core/formula_math.h"
#include "cuda/formula/formula_norm.cuh"
#include "plan/formula_persistent_shape.h"

namespace fused_rnn::cuda {

// The blocks that share the units of a group: which one a block belongs to.
struct FormulaTeam {
  int number, row_tile, group, dir;  // number: among all teams of the layer
};
__device__ __forceinline__ FormulaTeam formula_team(const FormulaPersistentShape& shape, const FormulaTeams& teams) {
  FormulaTeam team;
  team.number = teams.first + simt::block_x() / shape.ranks;
  team.row_tile = team.number % teams.row_tiles;
  team.group = team.number / teams.row_tiles % shape.groups;
  team.dir = team.number / teams.row_tiles / shape.groups;
  return team;
}

// An element of a thread.
struct FormulaPersistentElement {
  int at;     // in arrays of the block
  int b;      // row of the tile
  int local;  // unit of the block, with padding
  int unit;   // of the layer
  bool real;  // no padding, and the row exists
};

template <class C, MathKind kMath, bool kBackward>
struct FormulaPersistentMemory {
  using Storage = typename StorageOf<kMath>::type;
  using Acc = std::conditional_t<kMath == MathKind::kFp64, double, float>;
  using Fragments = typename FragmentsOf<kMath, /*kUnitMajor=*/false, 0, simt::arch()>::type;
  using Moments = FormulaMoments<Acc>;
  static constexpr int kRows = kFormulaPersistentRows, kThreads = kFormulaPersistentThreads, kAtom = kFormulaPersistentAtom;
  static constexpr int kWarps = kThreads / simt::kWarpSize;
  static constexpr int kChunk = chunk_size(kMath), kSize = static_cast<int>(sizeof(Storage));
  static constexpr int kAtomElements = kAtom * kRows;
  static constexpr bool kRecurs = C::kRecurrentGates > 0;
  static constexpr int kLevels = kBackward ? C::kBackwardLevels : C::kForwardLevels;
  // What the recurrent product reads: a state, or of each gate the gradient of its product.
  static constexpr int kRecurrentVectors = kBackward ? C::kRecurrentGates : 1;
  static constexpr int kParameters = C::kParameters > 0 ? C::kParameters : 1;
  static constexpr int kValues = C::kValues > 0 ? C::kValues : 1;
  static constexpr int kPhases = C::kPhases > 0 ? C::kPhases : 1;
  static constexpr int kRing = 4;  // steps whose rows are noted

  static constexpr __device__ int level_of(int k) { return kBackward ? C::backward_level(k) : C::forward_level(k); }
  static constexpr __device__ bool is_product(int k) {
    return static_cast<FormulaPhase>(C::phase_kind(k)) == FormulaPhase::kProduct;
  }
  static constexpr __device__ bool is_centred(int k) {
    return static_cast<FormulaPhase>(C::phase_kind(k)) == FormulaPhase::kLayerNorm;
  }
  // Place of phase k among the products or norms of its level; with k = kPhases, how many the level has.
  static constexpr __device__ int place_of(int level, int k, bool product) {
    int count = 0;
    for (int i = 0; i < C::kPhases && i < k; ++i) count += level_of(i) == level && is_product(i) == product;
    return count;
  }
  // Index of phase k among the norms, and among the phases whose results later passes read; k = kPhases: their counts.
  static constexpr __device__ int norm_place(int k) {
    int count = 0;
    for (int i = 0; i < C::kPhases && i < k; ++i) count += !is_product(i);
    return count;
  }
  static constexpr __device__ int kept_place(int k) {
    int count = 0;
    for (int i = 0; i < C::kPhases && i < k; ++i) count += level_of(i) + 1 < kLevels;
    return count;
  }

  const FormulaLayer& p;
  const FormulaPersistentShape& s;
  const FormulaDirection& weights;
  unsigned char* const smem;
  const int rank, dir;
  const int64_t first_row;
  const int head_units;  // without padding
  const int first_unit;  // of the group, in the layer
  uint32_t exchange;     // number of the next one

  __device__ __forceinline__ FormulaPersistentMemory(const FormulaLayer& layer, const FormulaPersistentShape& shape,
                                                     const FormulaTeam& team)
      : p(layer),
        s(shape),
        weights(team.dir ? layer.weights[1] : layer.weights[0]),
        smem(simt::dynamic_smem()),
        rank(simt::block_x() % shape.ranks),
        dir(team.dir),
        first_row(static_cast<int64_t>(team.row_tile) * kRows),
        head_units(static_cast<int>(layer.H / layer.heads)),
        first_unit(team.group * shape.heads * head_units),
        exchange(0) {}

  // ------------------------------------------------------------------------------------------------------------ places

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(smem + offset);
  }
  __device__ __forceinline__ int elements() const { return s.slice * kRows; }
  __device__ __forceinline__ int atoms() const { return s.slice / kAtom; }
  __device__ __forceinline__ int vector_bytes() const { return s.units * kRows * kSize; }
  __device__ __forceinline__ Acc& array(int number, int element) const {
    return at<Acc>(s.arrays)[number * elements() + element];
  }
  __device__ __forceinline__ Storage& staged(int number, int element) const {
    return at<Storage>(s.staged)[number * elements() + element];
  }
  __device__ __forceinline__ Acc constant(int number, int unit) const {
    return simt::to_float(at<Storage>(s.constants)[number * s.slice + unit]);
  }
  __device__ __forceinline__ RowInfo* table(int64_t step) const {
    return at<RowInfo>(s.table) + static_cast<int>(step & (kRing - 1)) * kRows;
  }

  // Whether padded unit `unit` of the group is one, and which of the layer.
  __device__ __forceinline__ bool unit_of(int unit, int& of_layer) const {
    const int head = s.heads == 1 ? 0 : unit / s.head, within = unit - head * s.head;
    of_layer = first_unit + head * head_units + within;
    return unit < s.units && within < head_units;
  }
  // Units without padding among the first `padded` ones.
  __device__ __forceinline__ int count_before(int padded) const {
    const int head = padded / s.head, within = padded % s.head;
    if (head >= s.heads) return s.heads * head_units;
    return head * head_units + (within < head_units ? within : head_units);
  }
  __device__ __forceinline__ int count_of(int of_rank) const {
    return count_before((of_rank + 1) * s.slice) - count_before(of_rank * s.slice);
  }
  // Padded units of a block that are units of the group.
  __device__ __forceinline__ int units_of(int of_rank) const {
    const int left = s.units - of_rank * s.slice;
    return left < 0 ? 0 : left < s.slice ? left : s.slice;
  }

  __device__ __forceinline__ FormulaPersistentElement element(int i) const {
    FormulaPersistentElement e;
    e.at = i;
    e.b = i / kAtom % kRows;
    e.local = i / kAtomElements * kAtom + i % kAtom;
    e.real = unit_of(rank * s.slice + e.local, e.unit) && first_row + e.b < p.seq.B;
    return e;
  }
  template <class F>
  __device__ __forceinline__ void for_elements(F&& f) const {
#pragma unroll 1
    for (int i = simt::thread_x(); i < elements(); i += kThreads) f(element(i));
  }

  // Indices of [D, B, H], of [D, N, blocks, H] and of [N, D * H].
  __device__ __forceinline__ int64_t state_index(const FormulaPersistentElement& e) const {
    return (dir * p.seq.B + first_row + e.b) * p.H + e.unit;
  }
  __device__ __forceinline__ int64_t kept_index(const FormulaPersistentElement& e, int64_t row, int64_t blocks) const {
    return (dir * p.seq.N + row) * blocks * p.H + e.unit;
  }
  __device__ __forceinline__ int64_t output_index(const FormulaPersistentElement& e, int64_t row) const {
    return (row * p.D + dir) * p.H + e.unit;
  }

  // ---------------------------------------------------------------------------------------------------------- exchange

  // Where so many vectors, or moments of so many norms, of exchange `number` lie.
  __device__ __forceinline__ unsigned char* vectors_of(uint32_t number, int vectors) const {
    return smem + s.vectors + (number & 1 ? s.vectors_bytes - vectors * vector_bytes() : 0);
  }
  __device__ __forceinline__ unsigned char* norms_of(uint32_t number, int norms) const {
    return smem + s.norms + (number & 1 ? s.norms_bytes - norms * s.ranks * kRows * static_cast<int>(sizeof(Moments)) : 0);
  }
  // Of a level's exchange, which is the next one.
  __device__ __forceinline__ unsigned char* vectors_of_level(int level) const {
    return vectors_of(exchange, place_of(level, C::kPhases, true));
  }
  __device__ __forceinline__ unsigned char* norms_of_level(int level) const {
    return norms_of(exchange, place_of(level, C::kPhases, false));
  }
  // What the recurrent product of the step with that number of exchange reads.
  __device__ __forceinline__ unsigned char* recurrent_vectors(uint32_t number) const {
    return s.recurrent_local ? smem + s.own_vector : vectors_of(number, kRecurrentVectors);
  }
  // The block's value in a vector.
  __device__ __forceinline__ void put(unsigned char* vector, const FormulaPersistentElement& e, Acc value) const {
    const int unit = rank * s.slice + e.local;
    if (unit >= s.units) return;
    unsigned char* const to = vector + unit / kChunk * (kRows * kChunkBytes) + k_major_offset(e.b, unit % kChunk * kSize);
    *reinterpret_cast<Storage*>(to) = simt::from_float<Storage>(value);
  }
  // What phase k is to read of an element: a product's goes into its vector, a norm's into the arrays from norms_at on.
  template <int k>
  __device__ __forceinline__ void hand_on(int norms_at, const FormulaPersistentElement& e, Acc value) const {
    if constexpr (is_product(k)) {
      put(vectors_of_level(level_of(k)) + place_of(level_of(k), k, true) * vector_bytes(), e, value);
    } else {
      array(norms_at + norm_place(k), e.at) = value;
    }
  }

  // The block's part of a vector in pieces of 16 bytes: how many, and where in the vector one lies.
  __device__ __forceinline__ int own_pieces() const { return units_of(rank) / (16 / kSize) * kRows; }
  __device__ __forceinline__ int own_piece(int piece) const {
    const int unit = rank * s.slice + piece / kRows * (16 / kSize);
    return unit / kChunk * (kRows * kChunkBytes) + k_major_offset(piece % kRows, unit % kChunk * kSize);
  }

  // -------------------------------------------------------------------------------------------------------------- begin

  // A matrix of shared memory: `rows` rows of `chunks` chunks of K. load(row, k): an element, zero outside. across: the
  // elements of neighbouring rows, and not those of neighbouring k, lie side by side in global memory.
  template <class Load>
  __device__ __forceinline__ void fill_matrix(int offset, int rows, int chunks, bool across, Load&& load) const {
    const int K = chunks * kChunk, inner = across ? rows : K;
#pragma unroll 4
    for (int i = simt::thread_x(); i < rows * K; i += kThreads) {
      const int row = across ? i % inner : i / inner, k = across ? i / inner : i % inner;
      unsigned char* const to = smem + offset + k / kChunk * rows * kChunkBytes + k_major_offset(row, k % kChunk * kSize);
      *reinterpret_cast<Storage*>(to) = load(row, k);
    }
  }
  // The same with pieces of 16 bytes along k. find(row, k): where the piece lies, or null: zeros.
  template <class Find>
  __device__ __forceinline__ void copy_matrix(int offset, int rows, int chunks, Find&& find) const {
    constexpr int kUnits = 16 / kSize;
    const int pieces = chunks * kChunk / kUnits;
#pragma unroll 4
    for (int i = simt::thread_x(); i < rows * pieces; i += kThreads) {
      const int row = i / pieces, k = i % pieces * kUnits;
      unsigned char* const to = smem + offset + k / kChunk * rows * kChunkBytes + k_major_offset(row, k % kChunk * kSize);
      const Storage* const from = find(row, k);
      simt::cp_async<16>(to, from ? from : weights_base(), from ? 16 : 0);
    }
  }
  __device__ __forceinline__ const Storage* weights_base() const {
    return static_cast<const Storage*>(kRecurs ? weights.w_hh : weights.weight[0]);
  }

  // W_hh: of a head [gates][units][units]; null: padding. unit: padded, of the block; k: of its head.
  __device__ __forceinline__ const Storage* recurrent_weight(int gate, int unit, int k) const {
    int of_layer;
    if (!unit_of(rank * s.slice + unit, of_layer) || k >= head_units) return nullptr;
    const int head = of_layer / head_units, within = of_layer % head_units;
    const int to = kBackward ? k : within, from = kBackward ? within : k;
    return static_cast<const Storage*>(weights.w_hh) +
           ((static_cast<int64_t>(head) * C::kRecurrentGates + gate) * head_units + to) * head_units + from;
  }
  // Phase k's [H][H]; unit and column are padded ones, of the block and of the group.
  __device__ __forceinline__ const Storage* phase_weight(int phase, int unit, int column) const {
    int u, v;
    if (!unit_of(rank * s.slice + unit, u) || !unit_of(column, v)) return nullptr;
    const int to = kBackward ? v : u, from = kBackward ? u : v;
    return static_cast<const Storage*>(weights.weight[phase]) + static_cast<int64_t>(to) * p.H + from;
  }
  // find(row, k), as above: by pieces where the rows allow it. Backward holds transposed matrices.
  template <class Find>
  __device__ __forceinline__ void load_matrix(int offset, int rows, int chunks, Find&& find) const {
    if (!kBackward && s.copy_vectors) return copy_matrix(offset, rows, chunks, find);
    fill_matrix(offset, rows, chunks, kBackward, [&](int row, int k) {
      const Storage* const from = find(row, k);
      return from ? *from : simt::from_float<Storage>(Acc(0));
    });
  }
  __device__ __forceinline__ void load_weights() const {
    if constexpr (kRecurs) {
      const int chunks = s.head / kChunk, gates = kBackward ? 1 : C::kRecurrentGates;
      load_matrix(s.weights[0], gates * s.slice, (kBackward ? C::kRecurrentGates : 1) * chunks, [&](int row, int k) {
        return kBackward ? recurrent_weight(k / s.head, row, k % s.head) : recurrent_weight(row / s.slice, row % s.slice, k);
      });
    }
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      if constexpr (is_product(k)) {
        load_matrix(s.weights[k + 1], s.slice, s.units / kChunk,
                    [&](int row, int column) { return phase_weight(k, row, column); });
      }
    });
    simt::cp_async_commit();
  }

  // Constants of a unit: biases of the recurrent products, parameters, then weight and bias of each phase, of norms alone.
  static constexpr int kBiases = C::kRecurrentGates, kNormWeights = kBiases + C::kParameters;
  static constexpr int kConstants = kNormWeights + 2 * C::kPhases;
  __device__ __forceinline__ void load_constants() const {
    for (int i = simt::thread_x(); i < kConstants * s.slice; i += kThreads) {
      const int number = i / s.slice;
      int unit;
      const bool real = unit_of(rank * s.slice + i % s.slice, unit);
      const void* from = weights.b_hh;
      int64_t index = static_cast<int64_t>(number) * p.H + unit;
      if (number >= kNormWeights) {
        const int phase = (number - kNormWeights) / 2;
        from = is_product(phase) ? nullptr : (number - kNormWeights) % 2 ? weights.bias[phase] : weights.weight[phase];
        index = unit;
      } else if (number >= kBiases) {
        from = weights.parameters;
        index -= static_cast<int64_t>(kBiases) * p.H;
      }
      at<Storage>(s.constants)[i] =
          real && from ? static_cast<const Storage*>(from)[index] : simt::from_float<Storage>(Acc(0));
    }
  }

  // Weights and constants are there, and zeros in all that is exchanged.
  __device__ __forceinline__ void start() const {
    load_weights();
    load_constants();
    const simt::Vec<uint32_t, 4> zeros{};
    const auto clear = [&](int offset, int bytes) {
      for (int i = simt::thread_x(); i < bytes / 16; i += kThreads) {
        simt::store_vec(at<uint32_t>(offset) + 4 * i, zeros);
      }
    };
    clear(s.vectors, s.vectors_bytes);
    if (s.recurrent_local) clear(s.own_vector, kRecurrentVectors * vector_bytes());
    simt::cp_async_wait<0>();
    simt::sync_block();
  }
};

}  // namespace fused_rnn::cuda
