// What threads do together: barriers, warp collectives, asynchronous copies, spinning; and what each orders.
#include <algorithm>
#include <cstring>

#include "device.h"

namespace simt_host {

namespace {
std::vector<Thread*> copiers;  // threads with copies under way

void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.bytes);
  if (copy.source_bytes) std::memcpy(copy.to, copy.from, copy.source_bytes);
}
}  // namespace

Clock later(const Clock& a, const Clock& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  const bool a_longer = a->size() >= b->size();
  auto result = std::make_shared<std::vector<uint32_t>>(a_longer ? *a : *b);
  const std::vector<uint32_t>& other = a_longer ? *b : *a;
  for (size_t i = 0; i < other.size(); ++i) (*result)[i] = std::max((*result)[i], other[i]);
  return result;
}

void join_clocks(const std::vector<Thread*>& threads) {
  Thread* first = threads[0];
  const size_t total = 2 * static_cast<size_t>(first->block->grid->block_count) * first->block->grid->spec.threads;
  Clock base = first->base, weak = first->weak;
  std::vector<const std::vector<uint32_t>*> seen{base.get(), weak.get()};
  uint32_t visible = 0;
  const auto add = [&seen](Clock& to, const Clock& from) {
    if (!from || std::find(seen.begin(), seen.end(), from.get()) != seen.end()) return;
    seen.push_back(from.get());
    to = later(to, from);
  };
  for (Thread* t : threads) {
    add(base, t->base);
    add(weak, t->weak);
    visible = std::max(visible, t->visible_grid);
  }
  auto joined = base ? std::make_shared<std::vector<uint32_t>>(*base) : std::make_shared<std::vector<uint32_t>>(total, 0u);
  for (Thread* t : threads) {
    (*joined)[t->tid] = t->clock;
    (*joined)[t->agent] = std::max((*joined)[t->agent], t->agent_seen);
  }
  for (Thread* t : threads) {
    t->base = joined;
    t->weak = weak;
    t->visible_grid = visible;
    ++t->clock;
  }
}

void meet(Barrier& b, int expected, bool* predicate, Wait wait, const char* what, int id, uintptr_t pc) {
  Thread* me = current_thread();
  if (b.arrived == 0) {
    b.expected = expected;
    b.any = false;
    b.pc = pc;
  }
  note_meeting(b.pc, pc, *me);
  if (predicate) b.any |= *predicate;
  b.participants.push_back(me);
  if (++b.arrived < expected) {
    block_current(wait, what, id, pc);
  } else {
    join_clocks(b.participants);
    for (Thread* t : b.participants) {
      t->barrier_result = b.any;
      if (t != me) wake(t);
    }
    b.participants.clear();
    b.arrived = 0;
    note_progress();
    if (next_random() % 4 == 0) yield_current();
  }
  if (predicate) *predicate = me->barrier_result;
}

void barrier(int id, int threads, bool* predicate, uintptr_t pc) {
  Thread* me = current_thread();
  Block& block = *me->block;
  const int all = block.grid->spec.threads;
  Barrier& b = block.barriers[id & 15];
  const int expected = threads ? threads : all;
  if (id < 0 || id > 15 || (threads && threads % 32 != 0) || expected > all) {
    fault("bad barrier",
          me->name() + " at " + where(pc) + ": barrier " + std::to_string(id) + " for " + std::to_string(expected) +
              " threads in a block of " + std::to_string(all),
          pc);
  }
  if (b.arrived && b.expected != expected) {
    fault("bad barrier",
          me->name() + " at " + where(pc) + " expects " + std::to_string(expected) + " threads at barrier " +
              std::to_string(id) + ", others at " + where(b.pc) + " expect " + std::to_string(b.expected),
          pc);
  }
  if (expected == all) {
    for (const auto& t : block.threads) {
      if (t->done) {
        fault(
            "partial barrier",
            me->name() + " reached the block's barrier at " + where(pc) + " and " + t->name() + " ended without reaching it",
            pc);
      }
    }
  }
  meet(b, expected, predicate, Wait::kBlock, "barrier", id, pc);
}

void warp_collective(const char* kind, uint32_t mask, void* payload, void (*complete)(void** payload), bool order_memory,
                     uintptr_t pc) {
  Thread* me = current_thread();
  Warp& warp = *me->warp;
  const int lane = me->index % 32;
  const auto diverged = [&](const std::string& why) {
    fault("divergent warp", me->name() + " at " + where(pc) + " (" + kind + "): " + why, pc);
  };
  if (!(mask >> lane & 1)) diverged("the lane is not in its own mask");
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= static_cast<int>(warp.lanes.size())) diverged("the mask names lanes that the block does not have");
    if (warp.lanes[l]->done) diverged("lane " + std::to_string(l) + " of the mask has ended");
  }
  WarpOp* op = nullptr;
  for (WarpOp& pending : warp.ops) {
    if (!(pending.mask & mask)) continue;
    if (pending.mask != mask || std::strcmp(pending.kind, kind) != 0) {
      if (pending.mask >> lane & 1 || pending.arrived & mask) {
        diverged("other lanes of the warp wait at " + std::string(pending.kind) + " " + where(pending.pc));
      }
      continue;
    }
    op = &pending;
  }
  if (!op) {
    warp.ops.push_back({});
    op = &warp.ops.back();
    op->kind = kind;
    op->mask = mask;
    op->complete = complete;
    op->order_memory = order_memory;
    op->pc = pc;
  }
  note_meeting(op->pc, pc, *me);
  op->payload[lane] = payload;
  op->arrived |= 1u << lane;
  if (op->arrived != mask) {
    block_current(Wait::kWarp, kind, 0, pc);
    return;
  }
  const WarpOp done = *op;
  warp.ops.erase(warp.ops.begin() + (op - warp.ops.data()));
  if (done.complete) done.complete(const_cast<void**>(done.payload));
  if (order_memory) {
    std::vector<Thread*> lanes;
    for (int l = 0; l < 32; ++l) {
      if (mask >> l & 1) lanes.push_back(warp.lanes[l]);
    }
    join_clocks(lanes);
  }
  for (int l = 0; l < 32; ++l) {
    if (l != lane && (mask >> l & 1)) wake(warp.lanes[l]);
  }
}

void copy_async(void* to, const void* from, int bytes, int source_bytes, uintptr_t pc) {
  Thread* me = current_thread();
  if (source_bytes < 0 || source_bytes > bytes) {
    fault(
        "bad copy",
        me->name() + " at " + where(pc) + ": " + std::to_string(source_bytes) + " source bytes of " + std::to_string(bytes),
        pc);
  }
  const auto aligned = [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if (!aligned(to) || (source_bytes && !aligned(from))) {
    fault("misaligned access",
          me->name() + " at " + where(pc) + ": asynchronous copy of " + std::to_string(bytes) +
              " bytes between addresses that are not multiples of it",
          pc);
  }
  if (!in_shared(to))
    fault("out of bounds", me->name() + " at " + where(pc) + ": cp_async to memory that is not shared", pc);
  if (source_bytes) check_access_of(*me, from, source_bytes, kRead | kAsync | kUnaligned, pc);
  check_access_of(*me, to, bytes, kWrite | kAsync, pc);
  me->copies.push_back(
      {me->agent_clock, static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, source_bytes});
  if (!me->copier) {
    me->copier = true;
    copiers.push_back(me);
  }
}

void copy_commit() {
  Thread* me = current_thread();
  me->groups.push_back(me->agent_clock++);
}

void copy_wait(int pending, uintptr_t) {
  Thread* me = current_thread();
  while (me->groups.size() > static_cast<size_t>(pending)) {
    me->agent_seen = me->groups.front();
    me->groups.pop_front();
  }
  size_t kept = 0;
  for (const Copy& copy : me->copies) {
    if (copy.clock <= me->agent_seen) {
      land(copy);
    } else {
      me->copies[kept++] = copy;
    }
  }
  me->copies.resize(kept);
}

// Now and then one copy of one thread lands before anyone waits for it.
void land_some_copies() {
  if (copiers.empty() || next_random() % 4 != 0) return;
  const size_t at = next_random() % copiers.size();
  Thread* thread = copiers[at];
  if (!thread->copies.empty()) {
    Copy& copy = thread->copies[next_random() % thread->copies.size()];
    land(copy);
    copy = thread->copies.back();
    thread->copies.pop_back();
  }
  if (thread->copies.empty()) {
    thread->copier = false;
    copiers[at] = copiers.back();
    copiers.pop_back();
  }
}
// Copies go into the block's own shared memory, which ends with it.
void forget_copies(const Block& block) {
  copiers.erase(std::remove_if(copiers.begin(), copiers.end(), [&](const Thread* t) { return t->block == &block; }),
                copiers.end());
}
void drop_copies() { copiers.clear(); }

}  // namespace simt_host
