// Exchange between blocks of one grid: clusters, transaction barriers, flags; and what each orders.
#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "device.h"

namespace simt_host {

namespace {
struct TransactionBarrier {
  uint32_t phase = 0;
  int expected = 1, pending = 1;           // arrivals
  int64_t awaited = 0;                     // bytes expected less bytes come
  uint32_t agent = 0;                      // whose clock counts its phases, see Access
  std::vector<Snapshot> arrivals, pushes;  // of the current phase
  // What those of all completed phases make known. Arrivals are releases, pushes are not (see Thread).
  Clock base, weak;
  uint32_t visible_grid = 0;
  std::vector<Thread*> waiting;
  const Thread* unfenced = nullptr;  // who has initialised it and not yet fenced
  // The last join of a waiter: the threads of a block mostly know the same.
  Clock join_from[2], join_to[2];
};
std::unordered_map<const uint64_t*, TransactionBarrier> barriers;
std::unordered_map<const void*, std::shared_ptr<Snapshot>> flags;

std::vector<Store> stores;  // under way, oldest first

// Adds what each snapshot knows to a clock; snapshots of one block mostly share their clocks.
void merge(Clock& into, const std::vector<Snapshot>& snapshots, Clock Snapshot::* part, bool with_threads) {
  std::vector<const std::vector<uint32_t>*> seen;
  for (const Snapshot& s : snapshots) {
    const Clock& clock = s.*part;
    if (!clock || std::find(seen.begin(), seen.end(), clock.get()) != seen.end()) continue;
    seen.push_back(clock.get());
    into = later(into, clock);
  }
  if (!with_threads || snapshots.empty()) return;
  auto result = into ? std::make_shared<std::vector<uint32_t>>(*into) : std::make_shared<std::vector<uint32_t>>();
  for (const Snapshot& s : snapshots) {
    if (result->size() <= std::max(s.tid, s.agent)) result->resize(std::max(s.tid, s.agent) + 1);
    (*result)[s.tid] = std::max((*result)[s.tid], s.clock);
    (*result)[s.agent] = std::max((*result)[s.agent], s.agent_clock);
  }
  into = result;
}

void maybe_complete(TransactionBarrier& b) {
  if (b.pending || b.awaited) return;
  ++b.phase;
  b.pending = b.expected;
  merge(b.base, b.arrivals, &Snapshot::base, true);
  merge(b.weak, b.arrivals, &Snapshot::weak, false);
  merge(b.weak, b.pushes, &Snapshot::weak, false);
  merge(b.weak, b.pushes, &Snapshot::base, true);
  for (const auto* part : {&b.arrivals, &b.pushes}) {
    for (const Snapshot& s : *part) b.visible_grid = std::max(b.visible_grid, s.visible_grid);
  }
  auto base = b.base ? std::make_shared<std::vector<uint32_t>>(*b.base) : std::make_shared<std::vector<uint32_t>>();
  if (base->size() <= b.agent) base->resize(b.agent + 1);
  (*base)[b.agent] = b.phase;
  b.base = base;
  b.arrivals.clear();
  b.pushes.clear();
  for (Clock* clock : {&b.join_from[0], &b.join_from[1], &b.join_to[0], &b.join_to[1]}) clock->reset();
  note_progress();
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

void complete_bytes(const Store& store) {
  const auto it = barriers.find(store.mbarrier);
  if (it == barriers.end() || !is_mapped(store.mbarrier, 8)) {
    report("bad mbarrier", "a push by " + store.thread->name() + " counts its bytes at an mbarrier that is not there");
    return;
  }
  TransactionBarrier& b = it->second;
  if (b.unfenced) {
    report("bad mbarrier", "a push by " + store.thread->name() +
                               " counts its bytes at an mbarrier that was initialised without a fence for the cluster");
    return;
  }
  note_landed(store.to, store.bytes, store.thread->grid_number, store.thread->block->grid->pusher, b.agent, b.phase + 1);
  b.awaited -= store.bytes;
  b.pushes.push_back(*store.snapshot);
  maybe_complete(b);
}

void land(const Store& store) {
  note_progress();
  if (!is_mapped(store.to, store.bytes)) {
    report("out of bounds", "a push by " + store.thread->name() + " lands in memory of a block that has ended");
    return;
  }
  std::memcpy(store.to, store.data, store.bytes);
  if (store.mbarrier) complete_bytes(store);
  if (store.release) flags[store.to] = store.snapshot;
}

// Lands the stores that `choose` picks, but none before an older one to the same address.
template <class F>
void land_where(F&& choose) {
  std::vector<Store> kept, chosen;
  std::unordered_set<const void*> held;
  for (Store& store : stores) {
    if (!held.count(store.to) && choose(store)) {
      chosen.push_back(std::move(store));
    } else {
      held.insert(store.to);
      kept.push_back(std::move(store));
    }
  }
  stores.swap(kept);
  for (const Store& store : chosen) land(store);
}
}  // namespace

Snapshot snapshot_of(Thread& t) {
  Snapshot s{t.base, t.weak, t.tid, t.clock, t.agent, t.agent_seen, t.visible_grid};
  ++t.clock;
  return s;
}

void acquire(Thread& t, const Snapshot& s) {
  t.visible_grid = std::max(t.visible_grid, s.visible_grid);
  t.weak = later(t.weak, s.weak);
  const bool has_base = !s.base || s.base == t.base;
  if (has_base && knows(t.base, s.tid, s.clock) && knows(t.base, s.agent, s.agent_clock)) return;
  merge(t.base, {s}, &Snapshot::base, true);
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
      fault("partial barrier",
            current_thread()->name() + " reached the cluster's barrier at " + where(pc) +
                " and threads of its block of rank " + std::to_string(rank) + " ended without reaching it",
            pc);
    }
  }
  meet(grid.cluster_barriers[block.linear / size], size * grid.spec.threads, nullptr, Wait::kCluster,
       "the cluster's barrier", 0, pc);
}

uint32_t map_to_rank(const void* shared, int rank, uintptr_t pc) {
  Thread* me = current_thread();
  Block& block = *me->block;
  const int size = std::max(1, block.grid->spec.cluster);
  const auto* address = static_cast<const unsigned char*>(shared);
  if (address < block.smem || address >= block.smem + block.grid->spec.smem_bytes) {
    fault("out of bounds", me->name() + " at " + where(pc) + ": map_to_rank of an address outside the block's shared memory",
          pc);
  }
  if (rank < 0 || rank >= size) {
    fault("out of bounds",
          me->name() + " at " + where(pc) + ": rank " + std::to_string(rank) + " of a cluster of " + std::to_string(size),
          pc);
  }
  const Block* peer = block.grid->blocks[block.linear / size * size + rank].get();
  if (!peer) {
    fault("block ended", me->name() + " at " + where(pc) + ": the block of rank " + std::to_string(rank) + " has ended", pc);
  }
  return shared_window(peer->smem + (address - block.smem));
}

void mbarrier_init(uint64_t* barrier, int arrivals, uintptr_t pc) {
  Thread* me = current_thread();
  if (!in_shared(barrier)) fault("bad mbarrier", me->name() + " at " + where(pc) + ": not in shared memory", pc);
  check_access_of(*me, barrier, 8, kWrite, pc);
  if (arrivals < 1) fault("bad mbarrier", me->name() + " at " + where(pc) + ": made for no arrival", pc);
  TransactionBarrier& b = barriers[barrier] = {};
  b.expected = b.pending = arrivals;
  b.agent = me->block->grid->next_agent++;
  b.unfenced = me;
}

void fence_mbarrier_init() {
  for (auto& [address, barrier] : barriers) {
    if (barrier.unfenced == current_thread()) barrier.unfenced = nullptr;
  }
}

void mbarrier_expect(uint64_t* barrier, int bytes, uintptr_t pc) {
  Thread* me = current_thread();
  TransactionBarrier& b = find(barrier, kWrite, pc);
  if (b.pending == 0) {
    fault("bad mbarrier", me->name() + " at " + where(pc) + ": a second arrival in phase " + std::to_string(b.phase), pc);
  }
  b.awaited += bytes;
  --b.pending;
  b.arrivals.push_back(snapshot_of(*me));
  note_progress();
  maybe_complete(b);
}

void mbarrier_wait(uint64_t* barrier, int parity, bool acquire, uintptr_t pc) {
  Thread* me = current_thread();
  TransactionBarrier& b = find(barrier, kRead, pc);
  while ((b.phase & 1) == static_cast<uint32_t>(parity & 1)) {
    b.waiting.push_back(me);
    block_current(Wait::kMbarrier, "an mbarrier's phase", 0, pc);
  }
  if (!acquire) {
    me->promised = later(me->promised, b.base);
    me->weakly_promised = later(me->weakly_promised, b.weak);
    me->promised_grid = std::max(me->promised_grid, b.visible_grid);
    return;
  }
  if (!b.join_to[0] || b.join_from[0] != me->base || b.join_from[1] != me->weak) {
    b.join_from[0] = me->base;
    b.join_from[1] = me->weak;
    b.join_to[0] = later(me->base, b.base);
    b.join_to[1] = later(me->weak, b.weak);
  }
  me->base = b.join_to[0];
  me->weak = b.join_to[1];
  me->visible_grid = std::max(me->visible_grid, b.visible_grid);
}

void fence_acquire() {
  // The last results: the threads of a block mostly know the same.
  static Clock known[2], promised[2], result[2];
  Thread* me = current_thread();
  const auto join = [&](int i, Clock& mine, const Clock& more) {
    if (known[i] != mine || promised[i] != more) {
      known[i] = mine;
      promised[i] = more;
      result[i] = later(mine, more);
    }
    mine = result[i];
  };
  join(0, me->base, me->promised);
  join(1, me->weak, me->weakly_promised);
  me->visible_grid = std::max(me->visible_grid, me->promised_grid);
  me->promised.reset();
  me->weakly_promised.reset();
}

void store_async(uint32_t to, const void* data, int bytes, uint32_t barrier, uintptr_t pc) {
  Thread* me = current_thread();
  if (me->block->grid->spec.cluster < 2) {
    fault("bad push", me->name() + " at " + where(pc) + ": st.async is undefined in a cluster of one block", pc);
  }
  Store store{};
  store.thread = me;
  store.to = from_window(to);
  store.bytes = bytes;
  std::memcpy(store.data, data, bytes);
  store.mbarrier = reinterpret_cast<uint64_t*>(from_window(barrier));
  check_access_of(*me, store.mbarrier, 8, kWrite | kAtomic, pc);
  check_access_of(*me, store.to, bytes, kWrite | kAsync | kPush, pc);
  store.snapshot = std::make_shared<Snapshot>(snapshot_of(*me));
  stores.push_back(std::move(store));
}

void store_flag(void* to, const void* data, int bytes, bool release, uintptr_t pc) {
  Thread* me = current_thread();
  check_access_of(*me, to, bytes, kWrite | kAtomic, pc);
  Store store{};
  store.thread = me;
  store.to = static_cast<unsigned char*>(to);
  store.bytes = bytes;
  std::memcpy(store.data, data, bytes);
  store.release = release;
  if (release) store.snapshot = std::make_shared<Snapshot>(snapshot_of(*me));
  stores.push_back(std::move(store));
  note_progress();
}

void load_flag(void* result, const void* from, int bytes, bool acquire_it, uintptr_t pc) {
  Thread* me = current_thread();
  check_access_of(*me, from, bytes, kRead | kAtomic, pc);
  poll(pc);
  const auto own = [&](const Store& store) { return store.thread == me && store.to == from; };
  if (std::any_of(stores.begin(), stores.end(), own)) land_where(own);
  std::memcpy(result, from, bytes);
  if (!acquire_it) return;
  const auto it = flags.find(from);
  if (it != flags.end()) acquire(*me, *it->second);
}

void land_some_stores() {
  if (stores.empty() || next_random() % (slow_stores() ? 4096 : 8) != 0) return;
  const uint32_t share = next_random() % 3;  // few, half or all
  land_where([&](const Store&) { return share == 2 || next_random() % (share == 0 ? 16 : 2) == 0; });
}
bool land_all_stores() {
  const bool any = !stores.empty();
  land_where([](const Store&) { return true; });
  return any;
}
void land_stores_of(const Block& block) {
  const auto* end = block.smem + block.grid->spec.smem_bytes;
  for (const Store& store : stores) {
    if (store.to >= block.smem && store.to < end) {
      report("block ended", block.name() + " ended while a push by " + store.thread->name() + " into it is under way");
    }
  }
  land_where([&](const Store& store) { return store.thread->block == &block; });
}

void drop_exchange() {
  barriers.clear();
  flags.clear();
  stores.clear();
}

}  // namespace simt_host
