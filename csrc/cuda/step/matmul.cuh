// The product of weight rows and state rows that every step kernel makes (plan/step_geometry.h).
//
// A block computes acc[slot][unit][batch row] for its tile. Team t takes the K chunks t, t + teams, ... through its own ring
// of `stages` stages in shared memory, each a weight tile and a state tile of kChunkBytes of K. Weights do not depend on the
// preceding launch, so the first stages' are requested before pdl_wait, the states' after it.
//   registers      acc: slots x (16 x 8 tiles of the warp) x 4 per lane
//   shared memory  table of rows | rings, later partial sums
//   barriers       one per chunk inside a team (a warp barrier where the team is one warp); two of the block around the
//                  exchange of partial sums
#pragma once
#include <type_traits>

#include "cuda/device/fragments.cuh"

namespace fused_rnn::cuda {

// What a product is compiled for: kGroups blocks of weight rows, whose sums are added to kSlots accumulators.
template <KernelRole kRoleValue, MathKind kMathValue, TileSize kSizeValue, int kGroupsValue, int kSlotsValue>
struct ProductGeometry {
  static constexpr KernelRole kRole = kRoleValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr TileShape kTile = tile_shape(kRole, kMath, kSizeValue);
  using Storage = typename StorageOf<kMath>::type;
  using Acc = std::conditional_t<kMath == MathKind::kFp64, double, float>;

  static constexpr bool kUnitMajor = is_unit_major(kRole);
  static constexpr int kUnits = kTile.units, kBatch = kTile.batch;
  static constexpr int kTeams = kTile.teams;
  static constexpr int kTeamThreads = 32 * kTile.warps_u * kTile.warps_b;
  static constexpr int kThreads = tile_threads(kTile);
  static constexpr int kChunk = chunk_size(kMath);
  static constexpr int kGroups = kGroupsValue, kSlots = kSlotsValue;
  static constexpr int kOperands = operand_count(kRole);
  static constexpr bool kModified = is_modified(kRole);
  static constexpr int kPitch = unit_pitch_bytes(kTile, kMath);
  static constexpr int kWeightBytes = weight_stage_bytes(kRole, kGroups, kMath, kTile);
  static constexpr int kStageBytes = stage_bytes(kRole, kGroups, kMath, kTile);
  static constexpr int kSumPitch = sum_pitch(kSlots, kTile);
  static constexpr int kTableBytes = table_bytes(kTile);
  static constexpr int kAtomsU = kUnits / 16 / kTile.warps_u, kAtomsB = kBatch / 8 / kTile.warps_b;
  // Elements (unit, batch row) of the tile that one thread finishes.
  static constexpr int kElements = (kUnits * kBatch + kThreads - 1) / kThreads;
  using Accumulators = Acc[kSlots][kAtomsU][kAtomsB][4];

  // What a product of two phases may have otherwise: fewer groups in one phase, and groups that do not follow each other at
  // once (Operand::stride).
  static constexpr __device__ int groups(int) { return kGroups; }
  static constexpr bool kStrided = false;

  static_assert(kUnits % (16 * kTile.warps_u) == 0 && kBatch % (8 * kTile.warps_b) == 0);
  static_assert(kBatch <= kThreads, "one thread fills in each row of the table");
  static_assert(kWeightBytes % 16 == 0 && kStageBytes % 16 == 0 && kTableBytes % 128 == 0);
};

template <KernelRole kRoleValue, CellKind kCellValue, MathKind kMathValue, TileSize kSizeValue>
struct Geometry : ProductGeometry<kRoleValue, kMathValue, kSizeValue, weight_groups(kRoleValue, kCellValue),
                                  accumulator_slots(kRoleValue, kCellValue)> {
  static constexpr CellKind kCell = kCellValue;

  // The accumulator that gate g of the product of `phase` is added to.
  static constexpr __device__ int slot(int phase, int g) {
    return kRoleValue == KernelRole::kForwardInput && phase == 1 ? Cell<kCell>::recurrent_slot(g) : g;
  }
};

// One weight operand and how to copy it and the state rows it meets.
template <class Storage>
struct Operand {
  const Storage* weight;  // [groups, units, k], or [k, units] if unit-major
  int64_t units, k;
  int copy_bytes;      // alignment of every row of both: 16, 4, or one element
  int64_t stride = 0;  // rows from group to group; read where G::kStrided, else `units`
};

// The elements of a piece, each times its factor.
template <class Storage, class Bytes>
__device__ __forceinline__ Bytes multiplied(Bytes piece, const Bytes& factors) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Bytes) / sizeof(Storage)); ++i) {
    piece.v[i] = simt::from_float<Storage>(simt::to_float(piece.v[i]) * simt::to_float(factors.v[i]));
  }
  return piece;
}

// Copies kPieces pieces of kBytes per thread into shared memory. piece(i, source, target) sets source and target of piece i.
// If it returns false, its source is invalid and zeros are written. Where the copy is not asynchronous, a batch is loaded
// before it is stored.
template <class Storage, int kBytes, int kPieces, class F>
__device__ __forceinline__ void copy_pieces(F&& piece) {
  const Storage* source;
  if constexpr (kBytes >= 4 && simt::arch() >= 800) {
#pragma unroll(kBytes == 16 ? kPieces : 2)
    for (int i = 0; i < kPieces; ++i) {
      unsigned char* target;
      const bool valid = piece(i, source, target);
      simt::cp_async<kBytes>(target, source, valid ? kBytes : 0);
    }
  } else {
    constexpr int kBatchSize = kPieces % 4 == 0 ? 4 : kPieces % 3 == 0 ? 3 : kPieces % 2 == 0 ? 2 : 1;
    static_assert(kPieces % kBatchSize == 0);
    using Bytes = simt::Vec<Storage, kBytes / static_cast<int>(sizeof(Storage))>;
#pragma unroll 1
    for (int first = 0; first < kPieces; first += kBatchSize) {
      Bytes values[kBatchSize];
      unsigned char* targets[kBatchSize];
#pragma unroll
      for (int i = 0; i < kBatchSize; ++i) {
        values[i] = Bytes{};
        if (piece(first + i, source, targets[i])) values[i] = *reinterpret_cast<const Bytes*>(source);
      }
#pragma unroll
      for (int i = 0; i < kBatchSize; ++i) *reinterpret_cast<Bytes*>(targets[i]) = values[i];
    }
  }
}

// Calls f with the number of bytes to copy at once, as a compile-time constant.
template <class Storage, class F>
__device__ __forceinline__ void dispatch_copy(int copy_bytes, F&& f) {
  if (copy_bytes == 16) return f(std::integral_constant<int, 16>{});
  if constexpr (sizeof(Storage) == 2) {
    if (copy_bytes == 4) return f(std::integral_constant<int, 4>{});
  }
  f(std::integral_constant<int, static_cast<int>(sizeof(Storage))>{});
}

// Waits until at most `groups` of the thread's latest copies are under way, or one fewer: an exact count would put more
// branches into the loop.
__device__ __forceinline__ void wait_pending(int groups) {
  if (groups >= 4) {
    groups >= 6 ? simt::cp_async_wait<6>() : simt::cp_async_wait<4>();
  } else if (groups >= 2) {
    simt::cp_async_wait<2>();
  } else {
    groups == 1 ? simt::cp_async_wait<1>() : simt::cp_async_wait<0>();
  }
}
static_assert(kMaxStages - 2 == 6, "wait_pending counts to kMaxStages - 2");

template <class G>
class Matmul {
 public:
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using Fragments = typename FragmentsOf<G::kMath, G::kUnitMajor, G::kPitch, simt::arch()>::type;

  __device__ __forceinline__ Matmul(const Operand<Storage> (&operands)[G::kOperands], int64_t first_unit, int stages)
      : first_unit_(first_unit),
        stages_(stages),
        team_(simt::thread_x() / G::kTeamThreads),
        team_thread_(simt::thread_x() % G::kTeamThreads) {
    int64_t chunks = 0;
#pragma unroll
    for (int phase = 0; phase < G::kOperands; ++phase) {
      operands_[phase] = operands[phase];
      if (phase == G::kOperands - 1) last_phase_chunk_ = static_cast<int>(chunks);
      chunks += (operands[phase].k + G::kChunk - 1) / G::kChunk;
    }
    chunks_ = static_cast<int>((chunks - team_ + G::kTeams - 1) / G::kTeams);
    ring_ = simt::dynamic_smem() + G::kTableBytes + team_ * stages * G::kStageBytes;
  }

  // From now on states are multiplied by the factors of their rows (RowInfo::source). Of kForwardModified.
  __device__ __forceinline__ void multiply_states() { multiplies_ = true; }

  static __device__ __forceinline__ RowInfo* table() { return reinterpret_cast<RowInfo*>(simt::dynamic_smem()); }

  // Requests the weights of the first stages. Stages beyond the last chunk get zeros; the planner leaves a team at most one
  // of them.
  __device__ __forceinline__ void prefetch_weights() {
    for (int i = 0; i < stages_ - 1; ++i) fill_weights(i, i);
  }

  // Makes the product, after prefetch_weights and the filling of the table. any_row: the block has a state row that is not
  // zero.
  __device__ __forceinline__ void run(bool any_row, typename G::Accumulators& acc) {
    clear(acc);
    const int chunks = any_row ? chunks_ : 0;
    for (int i = 0; i < stages_ - 1; ++i) {
      fill_states(i, i);
      simt::cp_async_commit();
    }
    int slot = 0, fill_slot = stages_ - 1;
    for (int i = 0; i < chunks; ++i) {
      wait_pending(stages_ - 2);
      sync_team();
      const int next = i + stages_ - 1;
      if (next < chunks) {
        fill_weights(next, fill_slot);
        fill_states(next, fill_slot);
      }
      simt::cp_async_commit();
      if (G::kOperands == 1 || is_last_phase(i)) {
        multiply_stage<G::kOperands - 1>(slot, acc);
      } else {
        multiply_stage<0>(slot, acc);
      }
      slot = slot + 1 == stages_ ? 0 : slot + 1;
      fill_slot = fill_slot + 1 == stages_ ? 0 : fill_slot + 1;
    }
  }

  // Leaves the partial sums of all teams in shared memory, in the place of the rings.
  __device__ __forceinline__ void store_sums(const typename G::Accumulators& acc) {
    simt::cp_async_wait<0>();
    simt::sync_block();
    const int warp = team_thread_ / 32;
    Acc* sums = sum_base() + team_ * G::kBatch * G::kSumPitch;
#pragma unroll
    for (int s = 0; s < G::kSlots; ++s) {
#pragma unroll
      for (int u = 0; u < G::kAtomsU; ++u) {
#pragma unroll
        for (int b = 0; b < G::kAtomsB; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int unit = unit_base(warp) + 16 * u + Fragments::unit(i);
            const int batch = batch_base(warp) + 8 * b + Fragments::batch(i);
            sums[batch * G::kSumPitch + s * G::kUnits + unit] = acc[s][u][b][i];
          }
        }
      }
    }
    simt::sync_block();
  }

  // The complete sum of one element, after store_sums.
  static __device__ __forceinline__ Acc sum(int slot, int unit, int batch) {
    const Acc* sums = sum_base() + batch * G::kSumPitch + slot * G::kUnits + unit;
    Acc total = sums[0];
#pragma unroll
    for (int team = 1; team < G::kTeams; ++team) total += sums[team * G::kBatch * G::kSumPitch];
    return total;
  }

 private:
  static __device__ __forceinline__ Acc* sum_base() { return reinterpret_cast<Acc*>(simt::dynamic_smem() + G::kTableBytes); }
  static __device__ __forceinline__ int unit_base(int warp) { return warp / G::kTile.warps_b * G::kAtomsU * 16; }
  static __device__ __forceinline__ int batch_base(int warp) { return warp % G::kTile.warps_b * G::kAtomsB * 8; }

  static __device__ __forceinline__ void clear(typename G::Accumulators& acc) {
#pragma unroll
    for (int s = 0; s < G::kSlots; ++s) {
#pragma unroll
      for (int u = 0; u < G::kAtomsU; ++u) {
#pragma unroll
        for (int b = 0; b < G::kAtomsB; ++b) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[s][u][b][i] = Acc(0);
        }
      }
    }
  }

  __device__ __forceinline__ void sync_team() {
    if constexpr (G::kTeamThreads == 32) {
      simt::sync_warp();
    } else {
      simt::sync_named(1 + team_, G::kTeamThreads);
    }
  }

  // The i-th chunk of this team is chunk i * teams + team of all phases together.
  __device__ __forceinline__ int chunk_of(int i) const { return i * G::kTeams + team_; }
  __device__ __forceinline__ bool is_last_phase(int i) const { return chunk_of(i) >= last_phase_chunk_; }
  __device__ __forceinline__ int phase_of(int i) const { return G::kOperands == 1 || !is_last_phase(i) ? 0 : 1; }
  __device__ __forceinline__ int64_t first_k(int i) const {
    const int chunk = chunk_of(i);
    return static_cast<int64_t>(phase_of(i) ? chunk - last_phase_chunk_ : chunk) * G::kChunk;
  }

  __device__ __forceinline__ Operand<Storage> operand_of(int i) const {
    if constexpr (G::kOperands == 1) {
      return operands_[0];
    } else {
      return phase_of(i) ? operands_[1] : operands_[0];
    }
  }

  // Byte offset in a K-major stage of the piece `byte` of row first_row + skip, where skip is a multiple of kStep.
  template <int kStep>
  static __device__ __forceinline__ int piece_offset(int first_row, int skip, int byte) {
    if constexpr (kStep % 8 == 0) {
      return k_major_offset(first_row, byte) + skip * kChunkBytes;
    } else {
      return k_major_offset(first_row + skip, byte);
    }
  }

  // A thread copies the same columns of the rows first, first + kStep, ... of every group.
  template <int kBytes>
  __device__ __forceinline__ void fill_k_major(const Operand<Storage>& operand, int phase, int64_t k0, unsigned char* tile) {
    constexpr int kSize = sizeof(Storage), kPerRow = kChunkBytes / kBytes, kStep = G::kTeamThreads / kPerRow;
    constexpr int kRounds = G::kUnits / kStep;
    static_assert(G::kUnits % kStep == 0);
    const int row = team_thread_ / kPerRow, byte = team_thread_ % kPerRow * kBytes;
    const int64_t k = k0 + byte / kSize, left = operand.units - first_unit_ - row;
    const int units = k >= operand.k ? 0 : static_cast<int>(left);
    const Storage* base = operand.weight + ((first_unit_ + row) * operand.k + k);
    const int64_t stride = G::kStrided ? operand.stride : operand.units;
    copy_pieces<Storage, kBytes, G::kGroups * kRounds>([&](int n, const Storage*& source, unsigned char*& target) {
      const int group = n / kRounds, skip = n % kRounds * kStep;
      target = tile + piece_offset<kStep>(row, group * G::kUnits + skip, byte);
      source = base + (group * stride + skip) * operand.k;
      if constexpr (G::kOperands > 1 && G::groups(0) != G::groups(1)) {
        if (group >= G::groups(phase)) return false;
      }
      return skip < units;
    });
  }

  // A thread copies the same units of the K rows first, first + kStep, ...
  template <int kBytes>
  __device__ __forceinline__ void fill_unit_major(const Operand<Storage>& operand, int64_t k0, unsigned char* tile) {
    constexpr int kSize = sizeof(Storage), kPerRow = G::kUnits * kSize / kBytes, kStep = G::kTeamThreads / kPerRow;
    constexpr int kRounds = kStep ? G::kChunk / (kStep ? kStep : 1) : G::kChunk;
    const int row = kStep ? team_thread_ / kPerRow : 0;
    static_assert(kStep > 0 ? G::kChunk % kStep == 0 : kPerRow % G::kTeamThreads == 0);
    constexpr int kColumns = kStep ? 1 : kPerRow / G::kTeamThreads;
    const int first = kStep ? team_thread_ % kPerRow : team_thread_;
    const Storage* base = operand.weight + ((k0 + row) * operand.units + first_unit_ + first * kBytes / kSize);
    const int64_t left_k = operand.k - k0 - row, left_units = operand.units - first_unit_;
    copy_pieces<Storage, kBytes, kRounds * kColumns>([&](int n, const Storage*& source, unsigned char*& target) {
      const int skip = n / kColumns * (kStep ? kStep : 1), column = n % kColumns * G::kTeamThreads;
      target = tile + (row + skip) * G::kPitch + (first + column) * kBytes;
      source = base + (skip * operand.units + column * kBytes / kSize);
      return skip < left_k && (first + column) * kBytes / kSize < left_units;
    });
  }

  __device__ __forceinline__ void fill_weights(int i, int stage) {
    const Operand<Storage> operand = operand_of(i);
    const int64_t k0 = first_k(i);
    unsigned char* tile = ring_ + stage * G::kStageBytes;
    dispatch_copy<Storage>(operand.copy_bytes, [&](auto bytes) {
      if constexpr (G::kUnitMajor) {
        fill_unit_major<decltype(bytes)::value>(operand, k0, tile);
      } else {
        fill_k_major<decltype(bytes)::value>(operand, phase_of(i), k0, tile);
      }
    });
  }

  __device__ __forceinline__ void fill_states(int i, int stage) {
    const Operand<Storage> operand = operand_of(i);
    const int64_t k0 = first_k(i);
    const int phase = phase_of(i);
    unsigned char* tile = ring_ + stage * G::kStageBytes + G::kWeightBytes;
    dispatch_copy<Storage>(operand.copy_bytes, [&](auto bytes) {
      constexpr int kBytes = decltype(bytes)::value, kSize = sizeof(Storage);
      constexpr int kPerRow = kChunkBytes / kBytes, kStep = G::kTeamThreads / kPerRow;
      static_assert(G::kBatch % kStep == 0);
      const int row = team_thread_ / kPerRow, byte = team_thread_ % kPerRow * kBytes;
      const int64_t k = k0 + byte / kSize;
      if constexpr (G::kModified && !G::kUnitMajor) {
        if (multiplies_) return fill_multiplied<kBytes, kStep>(k, row, byte, operand, tile);
      }
      copy_pieces<Storage, kBytes, G::kBatch / kStep>([&](int n, const Storage*& source, unsigned char*& target) {
        target = tile + piece_offset<kStep>(row, n * kStep, byte);
        const auto* state = static_cast<const Storage*>(table()[row + n * kStep].source[phase]);
        const bool valid = state != nullptr && k < operand.k;
        source = valid ? state + k : operand.weight;
        return valid;
      });
    });
  }

  // The states of a stage times their factors. The thread waits for what it loads: copies past the registers could not
  // multiply.
  template <int kBytes, int kStep>
  __device__ __forceinline__ void fill_multiplied(int64_t k, int row, int byte, const Operand<Storage>& operand,
                                                  unsigned char* tile) {
    using Bytes = simt::Vec<Storage, kBytes / static_cast<int>(sizeof(Storage))>;
#pragma unroll 1
    for (int n = 0; n < G::kBatch / kStep; ++n) {
      const RowInfo& info = table()[row + n * kStep];
      Bytes value{};
      if (info.source[0] != nullptr && k < operand.k) {
        const auto* state = static_cast<const Storage*>(info.source[0]) + k;
        const auto* factors = static_cast<const Storage*>(info.source[1]) + k;
        value = multiplied<Storage>(*reinterpret_cast<const Bytes*>(state), *reinterpret_cast<const Bytes*>(factors));
      }
      *reinterpret_cast<Bytes*>(tile + piece_offset<kStep>(row, n * kStep, byte)) = value;
    }
  }

  template <int kPhase>
  __device__ __forceinline__ void multiply_stage(int stage, typename G::Accumulators& acc) {
    const unsigned char* weights = ring_ + stage * G::kStageBytes;
    const unsigned char* states = weights + G::kWeightBytes;
    const int warp = team_thread_ / 32;
#pragma unroll(Fragments::kUnroll)
    for (int k = 0; k < G::kChunk; k += Fragments::kStep) {
      typename Fragments::B b[G::kAtomsB];
#pragma unroll
      for (int n = 0; n < G::kAtomsB; ++n) b[n] = Fragments::load_b(states, batch_base(warp) + 8 * n, k);
#pragma unroll
      for (int g = 0; g < G::groups(kPhase); ++g) {
#pragma unroll
        for (int u = 0; u < G::kAtomsU; ++u) {
          const auto a = Fragments::load_a(weights, g * G::kUnits + unit_base(warp) + 16 * u, k);
#pragma unroll
          for (int n = 0; n < G::kAtomsB; ++n) Fragments::multiply(acc[G::slot(kPhase, g)][u][n], a, b[n]);
        }
      }
    }
  }

  Operand<Storage> operands_[G::kOperands];
  int64_t first_unit_;
  int stages_, team_, team_thread_;
  bool multiplies_ = false;
  int chunks_;            // of this team
  int last_phase_chunk_;  // first chunk of the last phase, over all teams
  unsigned char* ring_;
};

}  // namespace fused_rnn::cuda
