#include <algorithm>
#include <stdexcept>

#include "device.h"

namespace simt_host {

// For gdb: a place to stop at every fault.
extern "C" __attribute__((noinline)) void simt_stopped() { asm volatile(""); }

Limits limits{};
Stats stats{};
Context context{};

namespace {
struct GridName {
  std::string name;
  Dim grid;
  int threads;
};

uint64_t random_state = 1;
uint64_t policy = 0;
bool stores_are_slow = false;
Fiber scheduler;
Thread* current = nullptr;
std::vector<Thread*> runnable;
std::vector<Thread*> spinning;  // runnable, but they only poll
// Polls since a store became visible, a barrier was passed or a thread ended: what might make a poll succeed. Threads that
// only poll, and talk about it inside their warps, never get further.
size_t idle_polls = 0;
constexpr size_t kMaxIdlePolls = 1000;
// Bounds on a launch sequence, and on what one thread does between two scheduling points: far above what any kernel needs.
constexpr uint64_t kMaxSwitches = 300'000'000, kMaxAccesses = 5'000'000;
uint64_t accesses_at_switch = 0;
size_t alive_threads = 0;
std::deque<std::unique_ptr<Grid>> stream;  // oldest first; the active ones are a prefix
size_t active = 0;
std::vector<GridName> grid_names;  // of every grid since clear_stream, for reports
uint32_t first_number = 1, next_number = 1;
std::string last_kind, last_text;
bool faulted = false;

std::string dim_text(Dim d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

void record_fault(const std::string& kind, const std::string& text) {
  if (faulted) return;
  last_kind = kind;
  last_text = text;
  faulted = true;
  simt_stopped();
}

void thread_main() {
  enter_fiber(scheduler);
  Thread* me = current;
  me->block->grid->spec.body();
  me->done = true;
  current = nullptr;
  switch_fiber(me->fiber, scheduler, true);
}

uint32_t complete_prefix() {
  uint32_t newest = stream.empty() ? next_number - 1 : stream.front()->number - 1;
  for (const auto& grid : stream) {
    if (!grid->complete()) break;
    newest = grid->number;
  }
  return newest;
}

void start_block(Grid& grid, int linear) {
  auto& slot = grid.blocks[linear];
  slot = std::make_unique<Block>();
  Block& block = *slot;
  const Dim d = grid.spec.grid;
  block.grid = &grid;
  block.linear = linear;
  block.index = {linear % d.x, linear / d.x % d.y, linear / d.x / d.y};
  block.smem = shared_alloc(grid.spec.smem_bytes, "shared memory of " + block.name());
  block.alive = grid.spec.threads;
  const int total = grid.block_count * grid.spec.threads;
  for (int w = 0; w * 32 < grid.spec.threads; ++w) {
    block.warps.push_back(std::make_unique<Warp>());
    block.warps.back()->block = &block;
    block.warps.back()->index = w;
  }
  for (int i = 0; i < grid.spec.threads; ++i) {
    block.threads.push_back(std::make_unique<Thread>());
    Thread& t = *block.threads.back();
    t.block = &block;
    t.warp = block.warps[i / 32].get();
    t.warp->lanes.push_back(&t);
    t.index = i;
    t.grid_number = grid.number;
    t.tid = static_cast<uint32_t>(linear) * grid.spec.threads + i;
    t.agent = t.tid + total;
    t.visible_grid = grid.start_visible;
    t.fiber.stack = acquire_stack(&t.fiber.stack_bytes);
    prepare_fiber(t.fiber, thread_main);
    runnable.push_back(&t);
  }
  ++grid.resident;
  ++stats.blocks;
  stats.threads += grid.spec.threads;
  alive_threads += grid.spec.threads;
}

void finish_block(Block& block) {
  Grid& grid = *block.grid;
  land_stores_of(block);
  forget_copies(block);
  for (auto& thread : block.threads) release_stack(thread->fiber.stack);
  shared_free(block.smem, grid.spec.smem_bytes);
  if (!block.launched_dependents) ++grid.triggered;
  --grid.resident;
  ++grid.finished;
  const int linear = block.linear;
  grid.blocks[linear].reset();
}

void start_grid(Grid& grid) {
  grid.start_visible = !grid.spec.pdl || active == 0 ? grid.number - 1 : stream[active - 1]->start_visible;
  grid.blocks.resize(grid.block_count);
  grid.cluster_barriers.resize(grid.block_count / std::max(1, grid.spec.cluster));
  grid.order.resize(grid.block_count / std::max(1, grid.spec.cluster));
  for (size_t i = 0; i < grid.order.size(); ++i) grid.order[i] = static_cast<int>(i);
  for (size_t i = grid.order.size(); i > 1; --i) std::swap(grid.order[i - 1], grid.order[next_random() % i]);
  const bool together = grid.spec.cooperative;
  grid.max_resident = together ? grid.block_count : 1 + static_cast<int>(next_random() % 4);
  ++stats.grids;
  ++active;
}

// Starts what may start now: blocks of active grids, and the next grid when the one before it allows it.
void admit() {
  while (active > 0 && stream.front()->complete()) {
    for (Thread* waiter : stream.front()->pdl_waiters) wake(waiter);
    stream.pop_front();
    --active;
  }
  for (size_t i = 1; i < active; ++i) {
    if (!stream[i]->complete()) continue;
    for (Thread* waiter : stream[i]->pdl_waiters) wake(waiter);
    stream[i]->pdl_waiters.clear();
  }
  if (active < stream.size()) {
    Grid& next = *stream[active];
    const bool may = active == 0 || (next.spec.pdl && stream[active - 1]->triggered == stream[active - 1]->block_count);
    if (may && (active == 0 || runnable.empty() || next_random() % 4 == 0)) start_grid(next);
  }
  for (size_t i = 0; i < active; ++i) {
    Grid& grid = *stream[i];
    const int cluster = std::max(1, grid.spec.cluster);
    while (grid.next < grid.order.size() && (grid.resident == 0 || grid.resident + cluster <= grid.max_resident)) {
      const int first = grid.order[grid.next++] * cluster;
      for (int b = 0; b < cluster; ++b) start_block(grid, first + b);
    }
  }
}

std::string index_ranges(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    if (!text.empty()) text += ",";
    text += std::to_string(sorted[i]) + (j > i ? "-" + std::to_string(sorted[j]) : "");
    i = j + 1;
  }
  return text;
}

// One line for each block and place of waiting: which threads wait there, and for what.
std::string who_waits() {
  std::string text;
  for (size_t g = 0; g < active; ++g) {
    for (const auto& block : stream[g]->blocks) {
      if (!block) continue;
      std::vector<std::pair<std::string, std::vector<int>>> groups;
      for (const auto& t : block->threads) {
        const bool waits = !t->done && t->wait != Wait::kNone;
        std::string what = t->done ? "ended" : waits ? std::string("wait at ") + t->wait_what + " " : "can run";
        if (waits) what += (t->wait == Wait::kBlock ? std::to_string(t->wait_id) + " " : "") + where(t->wait_pc);
        auto it = std::find_if(groups.begin(), groups.end(), [&](const auto& e) { return e.first == what; });
        if (it == groups.end()) it = groups.insert(groups.end(), {what, {}});
        it->second.push_back(t->index);
      }
      text += "\n  " + block->name() + ":";
      for (const auto& [what, who] : groups) text += " threads " + index_ranges(who) + " " + what + ";";
      for (int id = 0; id < 16; ++id) {
        const Barrier& b = block->barriers[id];
        if (b.arrived) {
          text += " barrier " + std::to_string(id) + " has " + std::to_string(b.arrived) + " of " +
                  std::to_string(b.expected) + " threads;";
        }
      }
    }
    const size_t waiting = stream[g]->order.size() - stream[g]->next;
    if (waiting)
      text += "\n  " + std::to_string(waiting) + " blocks (or clusters) of " + stream[g]->spec.name + " not started";
  }
  return text;
}

void after_switch(Thread* thread) {
  if (!thread->done) return;
  note_progress();
  --alive_threads;
  Block& block = *thread->block;
  Grid& grid = *block.grid;
  if (grid.spec.cluster > 1) {
    const Barrier& b = grid.cluster_barriers[block.linear / grid.spec.cluster];
    if (b.arrived && !faulted) {
      record_fault("partial barrier", "threads of the cluster of " + block.name() + " wait at its barrier at " +
                                          where(b.pc) + " and " + thread->name() +
                                          " ended without reaching it:" + who_waits());
    }
  }
  for (Barrier& b : block.barriers) {
    if (b.arrived && b.expected == block.grid->spec.threads && !faulted) {
      record_fault("partial barrier", "threads of " + block.name() + " wait at the block's barrier at " + where(b.pc) +
                                          " and " + thread->name() + " ended without reaching it:" + who_waits());
    }
  }
  for (const WarpOp& op : thread->warp->ops) {
    if ((op.mask >> (thread->index % 32) & 1) && !faulted) {
      record_fault("divergent warp", "lanes wait at " + std::string(op.kind) + " " + where(op.pc) + " and " +
                                         thread->name() + " ended without reaching it:" + who_waits());
    }
  }
  if (--block.alive == 0) finish_block(block);
}

Thread* pick() {
  size_t at;
  if (policy == 0) {
    at = next_random() % runnable.size();
  } else if (policy == 1) {  // the last to become ready runs on: one warp far ahead of the others
    at = next_random() % 64 == 0 ? next_random() % runnable.size() : runnable.size() - 1;
  } else {  // nearly in order
    at = next_random() % std::min<size_t>(runnable.size(), 4);
  }
  Thread* thread = runnable[at];
  if (policy == 2) {
    runnable.erase(runnable.begin() + at);
  } else {
    runnable[at] = runnable.back();
    runnable.pop_back();
  }
  return thread;
}
}  // namespace

std::string Block::name() const { return grid->spec.name + " block " + dim_text(index); }
std::string Thread::name() const { return block->name() + " thread " + std::to_string(index); }

std::string access_thread_name(const Access& access) {
  const size_t i = access.grid - first_number;
  if (i >= grid_names.size()) return "an earlier launch";
  const GridName& g = grid_names[i];
  const int total = g.grid.x * g.grid.y * g.grid.z * g.threads;
  if (access.tid >= 2u * total) return "a push of " + g.name;
  const int tid = static_cast<int>(access.tid) % total;
  const int linear = tid / g.threads;
  return g.name + " block " + dim_text({linear % g.grid.x, linear / g.grid.x % g.grid.y, linear / g.grid.x / g.grid.y}) +
         " thread " + std::to_string(tid % g.threads) +
         (current && current->grid_number != access.grid ? " of launch " + std::to_string(i) : "");
}

Thread* current_thread() { return current; }

uint32_t next_random() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}
void set_seed(uint64_t seed) {
  random_state = seed * 0x2545f4914f6cdd1du + 1;
  policy = seed % 3;
  stores_are_slow = seed % 2 == 1;
}
bool slow_stores() { return stores_are_slow; }

const std::string& fault_kind() { return last_kind; }
const std::string& fault_text() { return last_text; }

std::string waiting_text() { return who_waits(); }
void report(const std::string& kind, const std::string& text) { record_fault(kind, text); }

void note_access(uintptr_t pc) {
  if (++stats.accesses - accesses_at_switch < kMaxAccesses) return;
  fault("livelock",
        current->name() + " at " + where(pc) + ": " + std::to_string(kMaxAccesses) +
            " accesses without a scheduling point; a loop must wait by a primitive of simt.cuh",
        pc);
}

void fault(const std::string& kind, const std::string& text, uintptr_t) {
  record_fault(kind, text);
  Thread* me = current;
  if (!me) throw std::runtime_error(kind + ": " + text);
  current = nullptr;
  switch_fiber(me->fiber, scheduler, true);
  __builtin_unreachable();
}

void clear_stream() {
  for (auto& grid : stream) {
    for (auto& block : grid->blocks) {
      if (!block) continue;
      for (auto& thread : block->threads) release_stack(thread->fiber.stack);
    }
  }
  stream.clear();
  runnable.clear();
  spinning.clear();
  idle_polls = 0;
  accesses_at_switch = alive_threads = 0;
  drop_copies();
  drop_exchange();
  active = 0;
  grid_names.clear();
  first_number = next_number;
  faulted = false;
  last_kind.clear();
  last_text.clear();
}

void enqueue(LaunchSpec spec) {
  check_launch(spec);
  auto grid = std::make_unique<Grid>();
  grid->number = next_number++;
  grid->block_count = spec.grid.x * spec.grid.y * spec.grid.z;
  grid->pusher = 2 * static_cast<uint32_t>(grid->block_count) * spec.threads;
  grid->next_agent = grid->pusher + 1;
  grid_names.push_back({spec.name, spec.grid, spec.threads});
  grid->spec = std::move(spec);
  stream.push_back(std::move(grid));
}

bool run_stream() {
  while (!faulted) {
    admit();
    if (runnable.empty() && stream.empty()) break;
    if (runnable.empty()) {
      if (land_all_stores()) continue;
      if (!spinning.empty()) {
        runnable.swap(spinning);
        continue;
      }
      if (active > 0 && stream[0]->complete()) continue;
      record_fault("deadlock", "no thread can run:" + who_waits());
      break;
    }
    land_some_copies();
    land_some_stores();
    if (!spinning.empty() && next_random() % 16 == 0) {
      runnable.insert(runnable.end(), spinning.begin(), spinning.end());
      spinning.clear();
    }
    Thread* thread = pick();
    current = thread;
    thread->wait = Wait::kNone;
    context = {thread->index, thread->block->grid->spec.threads, thread->block->index, thread->block->smem};
    accesses_at_switch = stats.accesses;
    if (++stats.switches > kMaxSwitches) {
      record_fault("livelock", std::to_string(kMaxSwitches) + " scheduling points without an end:" + who_waits());
      break;
    }
    switch_fiber(scheduler, thread->fiber);
    current = nullptr;
    if (!faulted) after_switch(thread);
    if (idle_polls > kMaxIdlePolls * alive_threads) {
      record_fault("deadlock", "threads poll for what never comes:" + who_waits());
    }
  }
  return !faulted;
}

void block_current(Wait wait, const char* what, int id, uintptr_t pc) {
  Thread* me = current;
  me->wait = wait;
  me->wait_what = what;
  me->wait_id = id;
  me->wait_pc = pc;
  current = nullptr;
  switch_fiber(me->fiber, scheduler);
}
void wake(Thread* thread) { runnable.push_back(thread); }
void note_progress() { idle_polls = 0; }
void poll(uintptr_t pc) {
  ++idle_polls;
  spinning.push_back(current);
  block_current(Wait::kPoll, "a flag that it polls", 0, pc);
}
void yield_current() {
  runnable.push_back(current);
  block_current(Wait::kNone, "a scheduling point", 0, 0);
}

void grid_wait(uintptr_t pc) {
  Thread* me = current;
  const uint32_t number = me->grid_number;
  if (!me->block->grid->spec.pdl) return;
  Grid* before = nullptr;
  for (size_t i = 0; i < active; ++i) {
    if (stream[i]->number + 1 == number) before = stream[i].get();
  }
  if (before && !before->complete()) {
    before->pdl_waiters.push_back(me);
    block_current(Wait::kGrid, "pdl_wait", 0, pc);
  }
  me->visible_grid = std::max(me->visible_grid, std::min(complete_prefix(), number - 1));
}

void grid_launch_dependents() {
  Block& block = *current->block;
  if (!block.launched_dependents) {
    block.launched_dependents = true;
    ++block.grid->triggered;
  }
}

}  // namespace simt_host
