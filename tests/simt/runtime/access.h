// The simulated device's memory: one reserved address range that holds global buffers and every block's shared memory, with
// a state for each byte and a record of the last accesses for each pair of bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "api.h"

namespace simt_host {

struct Thread;
struct Grid;

enum ByteState : uint8_t { kUnmapped = 0, kPoison = 1, kDefined = 2, kClosed = 3 };
constexpr int kPoisonByte = 0xff;  // NaN in every floating-point format, -1 as an integer

// One access. grid 0: none. tid counts the threads of the grid, then their copy engines (Thread::agent), then whose pushes:
// those under way (Grid::pusher), and those that each mbarrier has counted, whose clock is the phase that they ended.
struct Access {
  uint32_t grid;
  uint32_t tid : 30;
  uint32_t atomic : 1;
  uint32_t async : 1;
  uint32_t clock;
  uint32_t site;  // offset of the instruction in the library
};
// Two bytes of memory: the last write and some of the reads since then. Reads that another recorded read is ordered after
// are dropped; when there are still more than fit, a random one goes (another seed drops another).
struct Cell {
  Access write;
  Access reads[3];
};

void memory_init();
// Global buffers, 256-byte aligned, with unmapped gaps between them. Filled with poison.
void* global_alloc(size_t bytes, const std::string& name);
void mark(void* address, size_t bytes, ByteState state);
void global_free_all();
// Memory that another stream may be writing: until open_all, an access is a fault. A prefetch is none.
void close(void* address, size_t bytes);
void open_all();
// Shared memory of a block. `live` end addresses are the caller's business: the range is a ring.
unsigned char* shared_alloc(size_t bytes, const std::string& name);
void shared_free(unsigned char* base, size_t bytes);
size_t count_state(const void* address, size_t bytes, ByteState state);
bool in_arena(const void* address);
bool in_shared(const void* address);
// 32-bit addresses of the shared memory of all blocks.
uint32_t shared_window(const void* address);
unsigned char* from_window(uint32_t address);
bool is_mapped(const void* address, size_t bytes);

// check_access by a given thread.
void check_access_of(Thread& thread, const void* address, size_t bytes, unsigned kind, uintptr_t pc);

// Reads of poison since the launch sequence began, for the report when an output turns out bad.
std::string poison_reads();
void forget_poison_reads();

// A push has landed: from now on its bytes are known to whoever knows `clock` of `tid`.
void note_landed(const void* address, size_t bytes, uint32_t grid, uint32_t pusher, uint32_t tid, uint32_t clock);

uint32_t site_of(uintptr_t pc);
std::string where(uintptr_t pc);  // "{pc:1234}", to be replaced by a source line
std::string where_site(uint32_t site);

}  // namespace simt_host
