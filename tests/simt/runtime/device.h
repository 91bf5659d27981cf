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
  const void* kernel;
  std::function<void()> body;
};

using Clock = std::shared_ptr<const std::vector<uint32_t>>;
struct Warp;
struct Block;

enum class Wait { kNone, kBlock, kWarp, kGrid, kPoll, kCluster, kMbarrier };

// What a thread knew when it released something: itself up to `clock`, its copy engine up to `agent_clock`, others by `base`.
struct Snapshot {
  Clock base;
  uint32_t tid, clock, agent, agent_clock, visible_grid;
};

// A write that has been issued and has not landed: a copy from global memory (cp.async), a push (st.async) or a store whose
// visibility to others nothing has ordered yet.
struct Copy {
  Thread* thread;
  uint32_t clock;  // of the thread's copy engine
  unsigned char* to;
  const unsigned char* from;  // null: data
  int bytes, source_bytes;
  unsigned char data[16];
  uint64_t* mbarrier;           // counts the bytes when they land
  std::shared_ptr<Snapshot> snapshot;  // what the landing releases
  bool release;                 // by a flag's store
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

void barrier(int id, int threads, bool* predicate, uintptr_t pc);
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

// A load in a spin loop: others run first. Counts towards a deadlock while nothing else happens.
void poll(uintptr_t pc);
void note_progress();

// Exchange between blocks.
void sync_cluster(uintptr_t pc);
int cluster_rank();
uint32_t map_to_rank(const void* shared, int rank, uintptr_t pc);
void mbarrier_init(uint64_t* barrier, uintptr_t pc);
void mbarrier_expect(uint64_t* barrier, int bytes, uintptr_t pc);
void mbarrier_wait(uint64_t* barrier, int parity, uintptr_t pc);
void store_async(uint32_t to, const void* data, int bytes, uint32_t barrier, uintptr_t pc);
// Stores that others see later, at a time that the seed chooses; stores of one thread to one address stay in order.
void store_flag(void* to, const void* data, int bytes, bool release, uintptr_t pc);
void load_flag(void* result, const void* from, int bytes, bool acquire, uintptr_t pc);
void drop_exchange();
// Called when a push has landed, and when a flag's store has.
void complete_bytes(uint64_t* barrier, int bytes, const Snapshot& snapshot);
void publish(const void* flag, const std::shared_ptr<Snapshot>& snapshot);
void add_copy(Copy copy);
void land_own_copies(Thread* thread, const void* to);
const char* pending_into(const unsigned char* base, size_t bytes);  // null: nothing is on its way there

Snapshot snapshot_of(Thread& thread);
void acquire(Thread& thread, const Snapshot& snapshot);
// Meets `expected` threads at `barrier`.
void meet(Barrier& barrier, int expected, bool* predicate, Wait wait, const char* what, int id, uintptr_t pc);
// A fault found outside any thread, such as when a copy lands.
void report(const std::string& kind, const std::string& text);


// Throws std::runtime_error with CUDA's condition when the device refuses the launch.
void check_launch(const LaunchSpec& spec);

// The dynamic shared memory that `kernel` has been allowed to use (the function attribute of CUDA).
void prepare_kernel(const void* kernel, const std::string& name, int smem_bytes);
void allow_large_clusters(const void* kernel);
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
