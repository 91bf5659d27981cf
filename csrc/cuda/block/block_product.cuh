// The constants of a kernel of family `block`, the elements of its lanes, its shared memory, and its product
// (plan/block_geometry.h).
//   registers      weights_: 4 words per chunk and tile of the warp; sums_: of the lane's elements
//   shared memory  the weights of further chunks; the states, two buffers in turn
//   barriers       none here; the caller's barrier stands between publish and the next run
#pragma once
#include "cuda/block/block_math.cuh"

namespace fused_rnn::cuda {

template <CellKind kCellValue, MathKind kMathValue, bool kBackwardValue, int kColumnsValue>
struct BlockGeometry {
  static constexpr CellKind kCell = kCellValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr bool kBackward = kBackwardValue, kBlock = true, kCluster = false, kScatters = false;
  static constexpr int kColumns = kColumnsValue;
  using Math = typename BlockMathOf<kMath, kColumns>::type;
  using Storage = typename Math::Storage;
  static constexpr FUSED_RNN_HD BlockShape shape() { return {kCell, kMath, kBackward, kColumns}; }
  static constexpr int kUnits = max_block_units(shape()), kWarpUnits = warp_units(shape());
  static constexpr int kThreads = 32 * max_block_warps(shape());
  static_assert(Math::kStep == block_chunk_step(kMath));
};

// One element of the calling lane. e: its number, below kPerThread.
template <class G>
struct LanePlace {
  static constexpr int kPerThread = G::kWarpUnits / 8 * G::kColumns;
  static constexpr bool mine = true;
  int unit, b;
  int number;

  __device__ __forceinline__ LanePlace(int, int e) : number(e) {
    unit = simt::warp_id() * G::kWarpUnits + e / G::kColumns * 8 + simt::lane_id() / 4;
    b = simt::lane_id() % 4 * G::kColumns + e % G::kColumns;
  }
};

template <class G>
class BlockProduct {
  using Math = typename G::Math;
  using Storage = typename G::Storage;
  static constexpr int kTiles = block_tiles(G::shape()), kRegisterChunks = block_register_chunks(G::shape());
  static constexpr int kChains = kTiles == 1 ? Math::kChains : 1, kWords = block_chunk_words(G::shape());
  static constexpr BlockSmem kSmem = block_smem(G::shape(), 1);  // right up to the place of the states
  static_assert(kRegisterChunks % kBlockBatch == 0 && kBlockBatch % kChains == 0);

 public:
  // w_hh: [gates, H, H] of this direction.
  __device__ __forceinline__ BlockProduct(const void* w_hh, int H)
      : chunks_(block_chunks(G::shape(), H)),
        chunks_of_gate_(chunks_of_gate(G::shape(), H)),
        buffer_words_(padded_chunks(G::shape(), H) * kWords),
        smem_chunks_(block_smem_chunks(G::shape(), H)) {
    const auto* weights = static_cast<const Storage*>(w_hh);
#pragma unroll
    for (int i = 0; i < kRegisterChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_fragment(weights_[i][m], weights, H, m, i);
    }
#pragma unroll 1
    for (int i = kRegisterChunks; i < chunks_; ++i) {
#pragma unroll 1
      for (int m = 0; m < kTiles; ++m) {
        simt::Vec<uint32_t, 4> words;
        load_fragment(words.v, weights, H, m, i);
        simt::store_vec(smem_fragment(i, m), words);
      }
    }
    for (int i = simt::thread_x(); i < 2 * buffer_words_; i += simt::block_dim_x()) states(0)[i] = 0;
  }

  // The sums of the weights and the states of a buffer.
  __device__ __forceinline__ void run(int buffer) {
    float acc[kChains][kTiles][Math::kAcc] = {};
    const uint32_t* const from = states(buffer);
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kBlockBatch) {
      if (first >= chunks_) break;
#pragma unroll
      for (int i = first; i < first + kBlockBatch; ++i) Math::multiply(acc[i % kChains], weights_[i], from + i * kWords);
    }
#pragma unroll 1
    for (int i = kRegisterChunks; i < chunks_; ++i) {
      uint32_t weights[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const auto words = simt::load_vec<4>(smem_fragment(i, m));
#pragma unroll
        for (int w = 0; w < 4; ++w) weights[m][w] = words.v[w];
      }
      Math::multiply(acc[0], weights, from + i * kWords);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int i = 0; i < Math::kAcc; ++i) acc[0][m][i] += acc[chain][m][i];
      }
      Math::sums(acc[0][m], sums_[m]);
    }
  }

  // What run left for an element, gate `gate` (0 backward).
  __device__ __forceinline__ float sum(int, int gate, const LanePlace<G>& e) const {
    const int row = pairs_gates(G::shape()) ? gate % 2 : e.number / G::kColumns;
    return sums_[gate / 2][2 * row + e.number % G::kColumns];
  }
  // Gate `gate` (0 forward) of an element for the next run of the buffer.
  __device__ __forceinline__ void publish(int buffer, int gate, const LanePlace<G>& e, float value) const {
    const int chunk = gate * chunks_of_gate_ + e.unit / Math::kStep;
    Math::put(states(buffer) + chunk * kWords, e.unit % Math::kStep, e.b, value);
  }

  static __device__ __forceinline__ int* lengths() { return at<int>(kSmem.lengths); }
  static __device__ __forceinline__ float& bias(int gate, int unit) {
    return at<float>(kSmem.biases)[gate * G::kUnits + unit];
  }

 private:
  template <class T>
  static __device__ __forceinline__ T* at(int offset) {
    return reinterpret_cast<T*>(simt::dynamic_smem() + offset);
  }
  __device__ __forceinline__ uint32_t* states(int buffer) const {
    return at<uint32_t>(kSmem.states) + buffer * buffer_words_;
  }
  __device__ __forceinline__ uint32_t* smem_fragment(int i, int m) const {
    const int index = (simt::warp_id() * smem_chunks_ + i - kRegisterChunks) * kTiles + m;
    return states(2) + index * kFragmentWords + simt::lane_id() * 4;
  }

  // Zeros from the last chunk on.
  __device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const Storage* weights, int H, int tile,
                                                int chunk) const {
    Math::load(words, [&](int m, int k) -> Storage {
      int row, column;
      bool valid;
      const int unit = simt::warp_id() * G::kWarpUnits + m % G::kWarpUnits;
      if constexpr (G::kBackward) {
        const int gate = chunk / chunks_of_gate_, other = chunk % chunks_of_gate_ * Math::kStep + k;
        column = unit;
        row = gate * H + other;
        valid = chunk < chunks_ && other < H && column < H;
      } else {
        const int gate = 2 * tile + m / G::kWarpUnits;
        column = chunk * Math::kStep + k;
        row = gate * H + unit;
        valid = gate < gate_count(G::kCell) && unit < H && column < H;
      }
      return valid ? weights[row * H + column] : Storage{};
    });
  }

  uint32_t weights_[kRegisterChunks][kTiles][4];
  float sums_[kTiles][4];
  int chunks_, chunks_of_gate_;
  int buffer_words_;
  int smem_chunks_;
};

}  // namespace fused_rnn::cuda
