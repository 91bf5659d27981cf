// Exchange between blocks of one grid: clusters, transaction barriers, flags; and what each orders.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "device.h"

namespace simt_host {

namespace {
struct TransactionBarrier {
  uint32_t phase = 0;
  int pending = 1;        // arrivals
  int64_t awaited = 0;    // bytes expected less bytes come
  std::vector<Snapshot> current, completed;
  std::vector<Thread*> waiting;
};
std::unordered_map<const uint64_t*, TransactionBarrier> barriers;
std::unordered_map<const void*, std::shared_ptr<Snapshot>> flags;

void maybe_complete(TransactionBarrier& b) {
  if (b.pending || b.awaited) return;
  ++b.phase;
  b.pending = 1;
  b.completed.insert(b.completed.end(), b.current.begin(), b.current.end());
  b.current.clear();
  for (Thread* t : b.waiting) wake(t);
  b.waiting.clear();
}

TransactionBarrier& find(uint64_t* barrier, unsigned kind, uintptr_t pc) {
  Thread* me = current_thread();
  if (!in_shared(barrier)) fault("bad mbarrier", me->name() + " at " + where(pc) + ": not in shared memory", pc);
  check_access_of(*me, barrier, 8, kind | kAtomic, pc);
  const auto it = barriers.find(barrier);
  if (it == barriers.end()) fault("bad mbarrier", me->name() + " at " + where(pc) + ": it was never initialised", pc);
  return it->second;
}
}  // namespace

Snapshot snapshot_of(Thread& t) {
  Snapshot s{t.base, t.tid, t.clock, t.agent, t.agent_seen, t.visible_grid};
  ++t.clock;
  return s;
}

void acquire(Thread& t, const Snapshot& s) {
  t.visible_grid = std::max(t.visible_grid, s.visible_grid);
  const bool has_base = !s.base || s.base == t.base;
  if (has_base && t.base && (*t.base)[s.tid] >= s.clock && (*t.base)[s.agent] >= s.agent_clock) return;
  const Grid& grid = *t.block->grid;
  auto joined = t.base ? std::make_shared<std::vector<uint32_t>>(*t.base)
                       : std::make_shared<std::vector<uint32_t>>(2 * size_t(grid.block_count) * grid.spec.threads, 0u);
  if (!has_base) {
    for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*s.base)[i]);
  }
  (*joined)[s.tid] = std::max((*joined)[s.tid], s.clock);
  (*joined)[s.agent] = std::max((*joined)[s.agent], s.agent_clock);
  t.base = joined;
}

int cluster_rank() {
  const Block& block = *current_thread()->block;
  return block.linear % std::max(1, block.grid->spec.cluster);
}

void sync_cluster(uintptr_t pc) {
  Block& block = *current_thread()->block;
  Grid& grid = *block.grid;
  const int size = std::max(1, grid.spec.cluster), first = block.linear / size * size;
  for (int rank = 0; rank < size; ++rank) {
    const Block* peer = grid.blocks[first + rank].get();
    if (!peer || peer->alive < grid.spec.threads) {
      fault("partial barrier", current_thread()->name() + " reached the cluster's barrier at " + where(pc) +
                                   " and threads of its block of rank " + std::to_string(rank) + " ended without reaching it",
            pc);
    }
  }
  meet(grid.cluster_barriers[block.linear / size], size * grid.spec.threads, nullptr, Wait::kCluster, "the cluster's barrier", 0,
       pc);
}

uint32_t map_to_rank(const void* shared, int rank, uintptr_t pc) {
  Thread* me = current_thread();
  Block& block = *me->block;
  const int size = std::max(1, block.grid->spec.cluster);
  const auto* address = static_cast<const unsigned char*>(shared);
  if (address < block.smem || address >= block.smem + block.grid->spec.smem_bytes) {
    fault("out of bounds", me->name() + " at " + where(pc) + ": map_to_rank of an address outside the block's shared memory", pc);
  }
  if (rank < 0 || rank >= size) {
    fault("out of bounds", me->name() + " at " + where(pc) + ": rank " + std::to_string(rank) + " of a cluster of " +
                               std::to_string(size),
          pc);
  }
  const Block* peer = block.grid->blocks[block.linear / size * size + rank].get();
  if (!peer) {
    fault("block ended", me->name() + " at " + where(pc) + ": the block of rank " + std::to_string(rank) + " has ended", pc);
  }
  return shared_window(peer->smem + (address - block.smem));
}

void mbarrier_init(uint64_t* barrier, uintptr_t pc) {
  Thread* me = current_thread();
  if (!in_shared(barrier)) fault("bad mbarrier", me->name() + " at " + where(pc) + ": not in shared memory", pc);
  check_access_of(*me, barrier, 8, kWrite, pc);
  barriers[barrier] = {};
}

void mbarrier_expect(uint64_t* barrier, int bytes, uintptr_t pc) {
  Thread* me = current_thread();
  TransactionBarrier& b = find(barrier, kWrite, pc);
  if (b.pending == 0) {
    fault("bad mbarrier", me->name() + " at " + where(pc) + ": a second arrival in phase " + std::to_string(b.phase), pc);
  }
  b.awaited += bytes;
  --b.pending;
  b.current.push_back(snapshot_of(*me));
  note_progress();
  maybe_complete(b);
}

void mbarrier_wait(uint64_t* barrier, int parity, uintptr_t pc) {
  Thread* me = current_thread();
  TransactionBarrier& b = find(barrier, kRead, pc);
  while ((b.phase & 1) == static_cast<uint32_t>(parity & 1)) {
    b.waiting.push_back(me);
    block_current(Wait::kMbarrier, "an mbarrier's phase", 0, pc);
  }
  for (const Snapshot& s : b.completed) acquire(*me, s);
  // What every thread of the block has seen need not be kept; a bound on the length is enough.
  if (b.completed.size() > 4096) b.completed.erase(b.completed.begin(), b.completed.end() - 2048);
}

void complete_bytes(uint64_t* barrier, int bytes, const Snapshot& snapshot) {
  const auto it = barriers.find(barrier);
  if (it == barriers.end() || !is_mapped(barrier, 8)) {
    report("bad mbarrier", "a push counts its bytes at an mbarrier that is not there");
    return;
  }
  it->second.awaited -= bytes;
  it->second.current.push_back(snapshot);
  maybe_complete(it->second);
}

void store_async(uint32_t to, const void* data, int bytes, uint32_t barrier, uintptr_t pc) {
  Thread* me = current_thread();
  unsigned char* address = from_window(to);
  auto* counted = reinterpret_cast<uint64_t*>(from_window(barrier));
  check_access_of(*me, counted, 8, kWrite | kAtomic, pc);
  Copy copy{};
  copy.thread = me;
  copy.snapshot = std::make_shared<Snapshot>(snapshot_of(*me));
  check_access_of(*me, address, bytes, kWrite | kAsync, pc);
  copy.clock = copy.snapshot->agent_clock = me->agent_clock++;
  copy.to = address;
  copy.bytes = copy.source_bytes = bytes;
  std::memcpy(copy.data, data, bytes);
  copy.mbarrier = counted;
  add_copy(std::move(copy));
}

void publish(const void* flag, const std::shared_ptr<Snapshot>& snapshot) { flags[flag] = snapshot; }

void store_flag(void* to, const void* data, int bytes, bool release, uintptr_t pc) {
  Thread* me = current_thread();
  check_access_of(*me, to, bytes, kWrite | kAtomic, pc);
  Copy copy{};
  copy.thread = me;
  if (release) copy.snapshot = std::make_shared<Snapshot>(snapshot_of(*me));
  copy.release = release;
  copy.to = static_cast<unsigned char*>(to);
  copy.bytes = copy.source_bytes = bytes;
  std::memcpy(copy.data, data, bytes);
  add_copy(std::move(copy));
  note_progress();
}

void load_flag(void* result, const void* from, int bytes, bool acquire_it, uintptr_t pc) {
  Thread* me = current_thread();
  check_access_of(*me, from, bytes, kRead | kAtomic, pc);
  poll(pc);
  land_own_copies(me, from);
  std::memcpy(result, from, bytes);
  if (!acquire_it) return;
  const auto it = flags.find(from);
  if (it != flags.end()) acquire(*me, *it->second);
}

void drop_exchange() {
  barriers.clear();
  flags.clear();
}

}  // namespace simt_host
