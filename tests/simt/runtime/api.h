// What the host implementation of simt.cuh needs of the simulated device. Kept apart from device.h so that the kernels need
// not be compiled again when the simulator changes inside. pc is the instruction of the kernel, for reports.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

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

enum AccessKind : unsigned {
  kRead = 0,
  kWrite = 1,
  kAtomic = 2,
  kAsync = 4,      // by the thread's copy engine, some time after now
  kUnaligned = 8,  // the C++ type promises no alignment
  kPush = 16,      // with kAsync: a push, which nobody knows of before it has landed and been awaited
  kHint = 32       // with kRead: has no effect, so the memory may be anyone's, but there has to be some
};
// Checks and records an access of the running thread; reports a fault instead of returning when it is not allowed.
void check_access(const void* address, size_t bytes, unsigned kind, uintptr_t pc);

// Another form of a kernel: the compiler's PTX, translated into C++ (../ptx). `pc` is the number that its first instruction
// has in reports.
struct KernelCode {
  void (*run)(const unsigned char* params, uintptr_t pc);
  uintptr_t pc;
};
// What runs in the place of a compiled kernel; `run` is null where nothing does. Throws std::runtime_error where the loader
// has nothing for this kernel.
KernelCode code_of(const void* kernel);
// The loader is told where in the library the compiled kernel lies. It returns whether it has filled in the code.
using Loader = bool (*)(uint64_t offset, KernelCode* code);

// Appends a grid to the stream. Throws std::runtime_error with CUDA's condition when the device would refuse the launch.
void enqueue(LaunchSpec spec);

// The dynamic shared memory that `kernel` has been allowed to use (the function attribute of CUDA).
void prepare_kernel(const void* kernel, const std::string& name, int smem_bytes);
void allow_large_clusters(const void* kernel);
int prepared_smem(const void* kernel);
void forget_prepared();

// What threads do together. A warp collective calls complete() with the payloads of all lanes once all have come.
void barrier(int id, int threads, bool* predicate, uintptr_t pc);
void warp_collective(const char* kind, uint32_t mask, void* payload, void (*complete)(void** payload), bool order_memory,
                     uintptr_t pc);
void grid_wait(uintptr_t pc);
void grid_launch_dependents();

void copy_async(void* to, const void* from, int bytes, int source_bytes, uintptr_t pc);
void copy_commit();
void copy_wait(int pending, uintptr_t pc);
// Exchange between blocks.
void sync_cluster(uintptr_t pc);
int cluster_rank();
uint32_t map_to_rank(const void* shared, int rank, uintptr_t pc);
void mbarrier_init(uint64_t* barrier, int arrivals, uintptr_t pc);
void mbarrier_expect(uint64_t* barrier, int bytes, uintptr_t pc);
// Without `acquire`, what the phase makes known is known after the thread's next fence_acquire only.
void mbarrier_wait(uint64_t* barrier, int parity, bool acquire, uintptr_t pc);
void fence_acquire();
// Shows the mbarriers that the thread has initialised to the cluster; before it, nobody may count bytes there.
void fence_mbarrier_init();
void store_async(uint32_t to, const void* data, int bytes, uint32_t barrier, uintptr_t pc);
// Stores that others see later, at a time that the seed chooses; stores of one thread to one address stay in order.
void store_flag(void* to, const void* data, int bytes, bool release, uintptr_t pc);
void load_flag(void* result, const void* from, int bytes, bool acquire, uintptr_t pc);

}  // namespace simt_host
