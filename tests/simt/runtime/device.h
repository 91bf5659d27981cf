// Grids, blocks, warps and threads of the simulated device, and the seeded scheduler that interleaves them.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "access.h"

namespace simt_host {

struct Dim {
  int x, y, z;
};
struct LaunchSpec {
  std::string name;
  Dim grid;
  int threads;
  int smem_bytes;
  int cluster;
  bool pdl;
  bool cooperative;
  bool nonportable_cluster;
  const void* kernel;
  std::function<void()> body;
};

using Clock = std::shared_ptr<const std::vector<uint32_t>>;
struct Warp;
struct Block;

enum class Wait { kNone, kBlock, kWarp, kGrid, kPoll, kCluster, kMbarrier };

// An asynchronous copy that has been issued and has not landed.
struct Copy {
  Thread* thread;
  uint32_t clock;  // of the thread's copy engine
  unsigned char* to;
  const unsigned char* from;
  int bytes, source_bytes;
};

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  int index;  // in the block
  uint32_t grid_number, tid, agent;
  // Happens-before: own time, copy engine's time, what is known of others, newest grid whose effects (and those of all before
  // it) are visible.
  uint32_t clock = 1, agent_clock = 1, agent_seen = 0;
  Clock base;
  uint32_t visible_grid = 0;
  // Waiting
  Wait wait = Wait::kNone;
  const char* wait_what = "";
  int wait_id = 0;
  uintptr_t wait_pc = 0;
  bool done = false;
  bool barrier_result = false;
  // Spinning: the last polled address and value
  const void* poll_address = nullptr;
  uint64_t poll_value = 0;
  // cp.async: engine times at which the committed groups end
  std::deque<uint32_t> groups;
  bool open_group = false;

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
  bool red = false;
  uintptr_t pc = 0;
  std::vector<Thread*> waiting, participants;
};

struct Cluster {
  int rank0;  // linear index of its first block
  std::vector<Block*> blocks;
  int alive = 0;
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
  bool complete() const { return finished == block_count; }
};

// What the kernel asks about itself; switched with the fibres.
struct Context {
  int thread_x, block_dim_x;
  Dim block;
  unsigned char* smem;
};
extern Context context;

struct Limits {
  int compute_capability, sm_count, smem_per_block, smem_per_sm, registers_per_sm, threads_per_sm, max_cluster;
};
extern Limits limits;

Thread* current_thread();
uint32_t next_random();
void set_seed(uint64_t seed);

// Appends a grid to the stream. Throws std::runtime_error with CUDA's condition when the device would refuse the launch.
void enqueue(LaunchSpec spec);
// Runs the stream to its end or to the first fault; returns false and empties the stream after a fault.
bool run_stream();
void clear_stream();

// Reports a fault and abandons the stream; on a fibre it does not return.
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

void barrier(int id, int threads, bool wait, bool* predicate, uintptr_t pc);
void warp_collective(const char* kind, uint32_t mask, void* payload, void (*complete)(void** payload), bool order_memory,
                     uintptr_t pc);
void grid_wait(uintptr_t pc);
void grid_launch_dependents();

void copy_async(void* to, const void* from, int bytes, int source_bytes, uintptr_t pc);
void copy_commit();
void copy_wait(int pending, uintptr_t pc);
void land_some_copies();
bool land_all_copies();  // whether there were any
void forget_copies(const Block& block);
void drop_copies();

// A load in a spin loop: when the value is the one this thread saw there last, others run first.
void poll(const void* address, uint64_t value, uintptr_t pc);
bool wake_pollers(int idle_rounds);
bool thread_polled();  // since the last call, by the thread that just ran, in vain
void drop_pollers();

// Throws std::runtime_error with CUDA's condition when the device refuses the launch.
void check_launch(const LaunchSpec& spec);

// The dynamic shared memory that `kernel` has been allowed to use (the function attribute of CUDA).
void prepare_kernel(const void* kernel, const std::string& name, int smem_bytes);
int prepared_smem(const void* kernel);
void forget_prepared();

// Two threads met at a barrier from different instructions: the caller compares the source lines.
void note_meeting(uintptr_t a, uintptr_t b, const Thread& thread);
std::string meetings_text();
void forget_meetings();

struct Stats {
  uint64_t grids, blocks, threads, switches, accesses;
};
extern Stats stats;

}  // namespace simt_host
