// The kernels of push.cu.
#pragma once
#include <simt.cuh>
#include <ticks.cuh>

namespace micro::push {

namespace simt = fused_rnn::simt;

constexpr int kThreads = 256, kPieces = 16, kPieceBytes = 16;

struct Push {
  int iterations, ranks;
  Ticks* ticks;
};

struct alignas(16) Shared {
  simt::MBarrier barriers[2];
  uint32_t slots[2][16 * kPieces * 4];
};

__global__ void __launch_bounds__(kThreads) one_way_kernel(const Push p) {
  if constexpr (simt::arch() >= 900) {
    auto* shared = reinterpret_cast<Shared*>(simt::dynamic_smem());
    const int rank = simt::cluster_rank(), last = p.ranks - 1;
    simt::MBarrier* barrier = &shared->barriers[0];
    if (simt::thread_x() == 0) {
      simt::mbarrier_init(barrier);
      simt::mbarrier_expect(barrier, kPieceBytes);
    }
    simt::sync_cluster();
    if (simt::thread_x() == 0 && (rank == 0 || rank == last)) {
      const int peer = rank == 0 ? last : 0;
      const simt::ClusterAddress to = simt::map_to_rank(shared->slots, peer), there = simt::map_to_rank(barrier, peer);
      uint32_t piece[4] = {1, 2, 3, 4};
      const Ticks start = now();
      for (int i = 0; i < p.iterations; ++i) {
        if (rank == 0) simt::store_async(to, piece, there);
        simt::mbarrier_wait(barrier, i & 1);
        simt::mbarrier_expect(barrier, kPieceBytes);
        if (rank == last) simt::store_async(to, piece, there);
      }
      if (rank == 0) store_elapsed(p.ticks, start);
    }
    simt::sync_cluster();
  }
}

__global__ void __launch_bounds__(kThreads) exchange_kernel(const Push p) {
  if constexpr (simt::arch() >= 900) {
    auto* shared = reinterpret_cast<Shared*>(simt::dynamic_smem());
    const int rank = simt::cluster_rank(), bytes = p.ranks * kPieces * kPieceBytes;
    if (simt::thread_x() == 0) {
      for (int i = 0; i < 2; ++i) {
        simt::mbarrier_init(&shared->barriers[i]);
        simt::mbarrier_expect(&shared->barriers[i], bytes);
      }
    }
    simt::sync_cluster();
    const int piece_index = simt::thread_x() / p.ranks, to_rank = simt::thread_x() % p.ranks;
    const auto push = [&](int step) {
      if (piece_index >= kPieces) return;
      uint32_t piece[4] = {static_cast<uint32_t>(step), 2, 3, 4};
      simt::store_async(simt::map_to_rank(&shared->slots[step & 1][(rank * kPieces + piece_index) * 4], to_rank), piece,
                        simt::map_to_rank(&shared->barriers[step & 1], to_rank));
    };
    const Ticks start = now();
    push(0);
    for (int step = 0; step < p.iterations; ++step) {
      simt::MBarrier* barrier = &shared->barriers[step & 1];
      simt::mbarrier_wait(barrier, step >> 1 & 1);
      if (simt::thread_x() == 0) simt::mbarrier_expect(barrier, bytes);
      simt::sync_block();
      if (step + 1 < p.iterations) push(step + 1);
    }
    if (rank == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
    simt::sync_cluster();
  }
}

}  // namespace micro::push
