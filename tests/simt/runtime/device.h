// Grids, blocks, warps and threads of the simulated device, and the seeded scheduler that interleaves them.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "access.h"
#include "api.h"
#include "fiber.h"

namespace simt_host {

using Clock = std::shared_ptr<const std::vector<uint32_t>>;
struct Warp;
struct Block;

enum class Wait { kNone, kBlock, kWarp, kGrid, kPoll, kCluster, kMbarrier };

// What a thread knew when it released something: itself up to `clock`, its copy engine up to `agent_clock`, others by
// `base`, and by `weak` all but their plain writes.
struct Snapshot {
  Clock base, weak;
  uint32_t tid, clock, agent, agent_clock, visible_grid;
};
inline bool knows(const Clock& clock, uint32_t tid, uint32_t time) {
  return clock && tid < clock->size() && time <= (*clock)[tid];
}

// A cp.async that has been issued and has not landed.
struct Copy {
  uint32_t clock;  // of the thread's copy engine
  unsigned char* to;
  const unsigned char* from;
  int bytes, source_bytes;
};
// A push (st.async) or a flag's store that has been issued and has not landed.
struct Store {
  Thread* thread;
  unsigned char* to;
  int bytes;
  unsigned char data[16];
  uint64_t* mbarrier;                  // counts the bytes of a push
  bool release;                        // by a flag
  std::shared_ptr<Snapshot> snapshot;  // what it makes known
};

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  int index;  // in the block
  uint32_t grid_number, tid, agent;
  // Happens-before: own time, copy engine's time, what is known of others, newest grid whose effects (and those of all
  // before it) are visible. `weak` is what pushes from other blocks have told beyond `base` (null: nothing). A push promises
  // its own bytes only; but what was read or awaited before it was issued is over, so it orders everything except plain
  // writes, which may still be on their way to other blocks.
  uint32_t clock = 1, agent_clock = 1, agent_seen = 0;
  Clock base, weak;
  uint32_t visible_grid = 0;
  // What waits without acquire have promised, see fence_acquire.
  Clock promised, weakly_promised;
  uint32_t promised_grid = 0;
  // Waiting
  Wait wait = Wait::kNone;
  const char* wait_what = "";
  int wait_id = 0;
  uintptr_t wait_pc = 0;
  bool done = false;
  bool barrier_result = false;
  // cp.async: engine times at which the committed groups end
  std::deque<uint32_t> groups;
  std::vector<Copy> copies;
  bool copier = false;  // is in the list of threads with copies under way

  std::string name() const;
};

struct WarpOp {
  const char* kind;
  uint32_t mask, arrived = 0;
  void* payload[32];
  void (*complete)(void** payload);
  bool order_memory;
  uintptr_t pc;
};
struct Warp {
  Block* block;
  int index;
  std::vector<Thread*> lanes;
  std::vector<WarpOp> ops;
};

struct Barrier {
  int expected = 0;  // 0: unused since the last completion
  int arrived = 0;
  bool any = false;
  uintptr_t pc = 0;
  std::vector<Thread*> participants;
};

struct Block {
  Grid* grid;
  Dim index;
  int linear;
  unsigned char* smem = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier barriers[16];
  int alive = 0;
  bool launched_dependents = false;
  std::string name() const;
};

struct Grid {
  LaunchSpec spec;
  uint32_t number;
  int block_count;
  int max_resident;
  std::vector<int> order;  // of starting the blocks (or clusters)
  size_t next = 0;         // into order
  int resident = 0, finished = 0, triggered = 0;
  uint32_t start_visible = 0;  // newest grid that is complete, with all before it, when this one starts
  std::vector<Thread*> pdl_waiters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Barrier> cluster_barriers;  // one a cluster
  uint32_t pusher = 0, next_agent = 0;    // see Access; the next mbarrier's
  bool complete() const { return finished == block_count; }
};

Thread* current_thread();
uint32_t next_random();
void set_seed(uint64_t seed);
// Odd seeds keep pushes and stores to flags under way as long as others can run.
bool slow_stores();

// Runs the stream to its end or to the first fault; returns false and empties the stream after a fault.
bool run_stream();
void clear_stream();

// Reports a fault and abandons the stream; on a fibre it does not return.
// For each block that runs: which threads wait where, and for what.
std::string waiting_text();
[[noreturn]] void fault(const std::string& kind, const std::string& text, uintptr_t pc);
const std::string& fault_kind();
const std::string& fault_text();
std::string access_thread_name(const Access& access);

// Happens-before among threads that met: each then knows all that any of them knew.
void join_clocks(const std::vector<Thread*>& threads);

// The running thread stops until something calls wake() on it.
void block_current(Wait wait, const char* what, int id, uintptr_t pc);
void wake(Thread* thread);
// The running thread lets others run.
void yield_current();

void land_some_copies();
void forget_copies(const Block& block);
void drop_copies();
void land_some_stores();
bool land_all_stores();  // whether there were any
void land_stores_of(const Block& block);

// A load in a spin loop: others run first. Counts towards a deadlock while nothing else happens.
void poll(uintptr_t pc);
void note_progress();
// Counts a plain access of the running thread.
void note_access(uintptr_t pc);

void drop_exchange();

Snapshot snapshot_of(Thread& thread);
// The thread knows from now on what the snapshot's did.
void acquire(Thread& thread, const Snapshot& snapshot);
// The later of both, for every entry; null: zeros.
Clock later(const Clock& a, const Clock& b);
// Meets `expected` threads at `barrier`.
void meet(Barrier& barrier, int expected, bool* predicate, Wait wait, const char* what, int id, uintptr_t pc);
// A fault found outside any thread, such as when a copy lands.
void report(const std::string& kind, const std::string& text);

// Throws std::runtime_error with CUDA's condition when the device refuses the launch.
void check_launch(const LaunchSpec& spec);

// Two threads met at a barrier from different instructions: the caller compares the source lines.
void note_meeting(uintptr_t a, uintptr_t b, const Thread& thread);
std::string meetings_text();
void forget_meetings();

void set_loader(Loader loader);

struct Stats {
  uint64_t grids, blocks, threads, switches, accesses;
};
extern Stats stats;

}  // namespace simt_host
