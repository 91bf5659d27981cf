// The constants of a kernel of family `block`, the elements of its lanes, its shared memory, and its product
// (plan/block_geometry.h).
//   registers      weights_: 4 words per chunk and tile of the warp; sums_: of the lane's elements
//   shared memory  the weights of further chunks; the states, two buffers in turn
//   barriers       none here; the caller's barrier stands between publish and the next product
#pragma once
#include "cuda/block/block_math.cuh"

namespace fused_rnn::cuda {

template <CellKind kCellValue, MathKind kMathValue, bool kBackwardValue>
struct BlockGeometry {
  static constexpr CellKind kCell = kCellValue;
  static constexpr MathKind kMath = kMathValue;
  static constexpr bool kBackward = kBackwardValue, kBlock = true, kCluster = false, kScatters = false;
  using Math = typename BlockMathOf<kMath>::type;
  using Storage = typename Math::Storage;
  static constexpr FUSED_RNN_HD BlockShape shape() { return {kCell, kMath, kBackward}; }
  static constexpr int kUnits = max_block_units(shape());
  static constexpr int kThreads = 32 * max_block_warps(shape());
  static_assert(Math::kStep == block_chunk_step(kMath));
};

// One element of the calling lane's pair. e: 0 or 1.
template <class G>
struct LanePlace {
  static constexpr int kPerThread = 2;
  static constexpr bool mine = true;
  int unit, b;
  int number;

  __device__ __forceinline__ LanePlace(int, int e) : number(e) {
    unit = simt::warp_id() * kWarpUnits + simt::lane_id() / 4 * 2 + e;
    b = simt::lane_id() % 4;
  }
};

template <class G>
class BlockProduct {
  using Math = typename G::Math;
  using Storage = typename G::Storage;
  static constexpr int kTiles = block_tiles(G::shape()), kRegisterChunks = block_register_chunks(G::shape());
  static constexpr int kChains = kTiles > 1                                ? 1
                                 : G::kThreads == 512 && Math::kChains > 2 ? 2
                                                                           : Math::kChains,
                       kWords = block_chunk_words(G::shape());
  static constexpr BlockSmem kSmem = block_smem(G::shape(), 1);  // right up to the place of the states
  static constexpr bool kHasSmemChunks = block_chunks(G::shape(), G::kUnits) > kRegisterChunks;
  static_assert(kRegisterChunks % kBlockBatch == 0 && kBlockBatch % kChains == 0);

 public:
  // w_hh: [gates, H, H] of this direction.
  __device__ __forceinline__ BlockProduct(const void* w_hh, int H)
      : chunks_(block_chunks(G::shape(), H)),
        buffer_bytes_(simt::opaque(padded_chunks(G::shape(), H) * kWords * 4)),
        gate_bytes_(simt::opaque(chunks_of_gate(G::shape(), H) * kWords * 4)),
        bias_(simt::opaque(kSmem.biases + first_unit() * 4)) {
    const auto* weights = static_cast<const Storage*>(w_hh);
#pragma unroll
    for (int i = 0; i < kRegisterChunks; ++i) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_fragment(weights_[i][m], weights, H, m, i);
    }
    if constexpr (kHasSmemChunks) {
#pragma unroll 1
      for (int i = kRegisterChunks; i < chunks_; ++i) {
#pragma unroll 1
        for (int m = 0; m < kTiles; ++m) {
          simt::Vec<uint32_t, 4> words;
          load_fragment(words.v, weights, H, m, i);
          simt::store_vec(smem_fragment(i, m), words);
        }
      }
    }
    for (int i = simt::thread_x(); i < buffer_bytes_ / 2; i += simt::block_dim_x()) at<uint32_t>(kSmem.states)[i] = 0;
    const LanePlace<G> e(0, 0);
    slot_ = simt::opaque(kSmem.states + e.unit / Math::kStep * kWords * 4 + Math::place(e.unit % Math::kStep, e.b));
  }

  // The product of the weights and the states of a buffer in two parts; what stands between them can go on beside the first.
  // offset: of the buffer.
  using Sums = float[kChains][kTiles][Math::kAcc];
  __device__ __forceinline__ void begin(Sums& acc, int offset) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < Math::kAcc; ++i) {
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) acc[chain][m][i] = 0.0f;
      }
      // Sums of mma.sync begin with the biases.
      if constexpr (!G::kBackward && Math::kAcc == 4) {
        const auto biases = biases_of_lane(m);
        acc[0][m][0] = biases.v[0];
        acc[0][m][2] = biases.v[1];
      }
    }
    multiply_batch(acc, 0, offset);
  }
  __device__ __forceinline__ void end(Sums& acc, int offset) {
#pragma unroll
    for (int first = kBlockBatch; first < kRegisterChunks; first += kBlockBatch) {
      if (first >= chunks_) break;
      multiply_batch(acc, first, offset);
    }
    if constexpr (kHasSmemChunks) {
#pragma unroll 1
      for (int i = kRegisterChunks; i < chunks_; ++i) {
        uint32_t weights[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const auto words = simt::load_vec<4>(smem_fragment(i, m));
#pragma unroll
          for (int w = 0; w < 4; ++w) weights[m][w] = words.v[w];
        }
        Math::multiply(acc[0], weights, states(offset) + i * kWords);
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int chain = 1; chain < kChains; ++chain) {
#pragma unroll
        for (int i = 0; i < Math::kAcc; ++i) acc[0][m][i] += acc[chain][m][i];
      }
      Math::sums(acc[0][m], sums_[m]);
      if constexpr (!G::kBackward && Math::kAcc != 4) {
        const auto biases = biases_of_lane(m);
#pragma unroll
        for (int r = 0; r < 2; ++r) sums_[m][r] += biases.v[r];
      }
    }
  }

  // What the product left for an element of the lane, gate `gate` (0 backward).
  __device__ __forceinline__ float sum(int, int gate, const LanePlace<G>& e) const { return sums_[gate][e.number]; }
  // Gate `gate` (0 forward) of the lane's pair for the next product with a buffer; and of one element.
  __device__ __forceinline__ void publish_pair(int offset, int gate, float low, float high) const {
    Math::put_pair(at<unsigned char>(slot_ + offset + gate * gate_bytes_), low, high);
  }
  __device__ __forceinline__ void publish(int offset, int gate, int i, float value) const {
    Math::put(at<unsigned char>(slot_ + offset + gate * gate_bytes_ + i * (Math::place(1, 0) - Math::place(0, 0))), value);
  }
  // Bytes from the first buffer to the second.
  __device__ __forceinline__ int second() const { return buffer_bytes_; }

  static __device__ __forceinline__ int* lengths() { return at<int>(kSmem.lengths); }
  static __device__ __forceinline__ float& bias(int gate, int unit) {
    return at<float>(kSmem.biases)[gate * G::kUnits + unit];
  }

 private:
  template <class T>
  static __device__ __forceinline__ T* at(int offset) {
    return reinterpret_cast<T*>(simt::dynamic_smem() + offset);
  }
  static __device__ __forceinline__ const uint32_t* states(int offset) { return at<uint32_t>(kSmem.states + offset); }
  __device__ __forceinline__ simt::Vec<float, 2> biases_of_lane(int gate) const {
    return simt::load_vec<2>(at<float>(bias_ + gate * G::kUnits * 4));
  }
  __device__ __forceinline__ void multiply_batch(Sums& acc, int first, int offset) const {
#pragma unroll
    for (int i = first; i < first + kBlockBatch; ++i) {
      Math::multiply(acc[i % kChains], weights_[i], states(offset) + i * kWords);
    }
  }
  static __device__ __forceinline__ int first_unit() { return simt::warp_id() * kWarpUnits + simt::lane_id() / 4 * 2; }
  __device__ __forceinline__ uint32_t* smem_fragment(int i, int m) const {
    const int index = (simt::warp_id() * (chunks_ - kRegisterChunks) + i - kRegisterChunks) * kTiles + m;
    return at<uint32_t>(kSmem.states + 2 * buffer_bytes_) + index * kFragmentWords + simt::lane_id() * 4;
  }

  // Zeros from the last chunk on.
  __device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const Storage* weights, int H, int tile,
                                                int chunk) const {
    const int of_gate = chunks_of_gate(G::shape(), H);
    Math::load(words, [&](int m, int k) -> Storage {
      int row, column;
      bool valid;
      const int unit = simt::warp_id() * kWarpUnits + m % 8 * 2 + m / 8;
      if constexpr (G::kBackward) {
        const int gate = chunk / of_gate, other = chunk % of_gate * Math::kStep + k;
        column = unit;
        row = gate * H + other;
        valid = chunk < chunks_ && other < H && column < H;
      } else {
        column = chunk * Math::kStep + k;
        row = tile * H + unit;
        valid = unit < H && column < H;
      }
      return valid ? weights[row * H + column] : Storage{};
    });
  }

  uint32_t weights_[kRegisterChunks][kTiles][4];
  float sums_[kTiles][2] = {};
  int slot_;  // bytes of shared memory: gate 0 of the lane's first unit in the first buffer
  int chunks_;
  int buffer_bytes_, gate_bytes_;
  int bias_;  // bytes of shared memory: of gate 0 of the lane's first unit
};

}  // namespace fused_rnn::cuda
