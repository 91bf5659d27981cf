// Every row's h before its step (core/previous.h), in one launch that copies rows.
// A warp owns some pairs of a step and a batch row; its lanes copy the row's pieces of kBytes in turn. Nothing is shared
// between threads: no shared memory, no barrier.
#include <algorithm>
#include <launch.cuh>
#include <simt.cuh>
#include <type_traits>

#include "core/ceil_div.h"
#include "core/previous.h"
#include "cuda/backend.h"
#include "cuda/copy_width.h"

namespace fused_rnn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / simt::kWarpSize;
constexpr int64_t kMostBlocks = 1 << 20;

struct PreviousRows {
  PreviousParams p;
  int64_t warps;  // of the launch
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads) previous_rows_kernel(const PreviousRows rows) {
  using Word = std::conditional_t<(kBytes >= 4), uint32_t, uint16_t>;
  using Piece = simt::Vec<Word, kBytes / static_cast<int>(sizeof(Word))>;
  const PreviousParams& p = rows.p;
  const int64_t pieces = p.row_bytes / kBytes;
  for (int64_t pair = int64_t{simt::block_x()} * kWarps + simt::warp_id(); pair < p.seq.T * p.seq.B; pair += rows.warps) {
    const int64_t t = pair / p.seq.B, b = pair % p.seq.B;
    if (p.seq.offsets && !is_active(p.seq, t, b)) continue;
    const auto* from = static_cast<const Piece*>(previous_row(p, t, b));
    auto* to = reinterpret_cast<Piece*>(static_cast<char*>(p.out) + row_of(p.seq, t, b) * p.row_bytes);
    for (int64_t i = simt::lane_id(); i < pieces; i += simt::kWarpSize) to[i] = from ? from[i] : Piece{};
  }
}

}  // namespace

void previous_rows(const PreviousParams& p, void* stream) {
  const int64_t pairs = p.seq.T * p.seq.B;
  if (pairs == 0 || p.row_bytes == 0) return;
  const int64_t blocks = std::min(ceil_div(pairs, kWarps), kMostBlocks);
  const PreviousRows rows{p, blocks * kWarps};
  const auto launch = [&](void (*kernel)(PreviousRows)) {
    simt::launch(kernel, {"previous_rows", static_cast<int>(blocks), 1, 1, kThreads, 0, 1, false, false}, stream, rows);
  };
  const ResetState& put = p.modifier.h;
  const int64_t distances = p.row_bytes | p.y_stride | put.step | put.direction | put.row;
  switch (copy_width({p.y, p.h0, p.out, put.data}, distances, 2)) {
    case 16: return launch(previous_rows_kernel<16>);
    case 4: return launch(previous_rows_kernel<4>);
    default: return launch(previous_rows_kernel<2>);
  }
}

}  // namespace fused_rnn::cuda
