#include "access.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simt_host {

namespace {
constexpr size_t kGlobalBytes = size_t{512} << 20;
constexpr size_t kSharedBytes = size_t{128} << 20;
constexpr size_t kArenaBytes = kGlobalBytes + kSharedBytes;
constexpr size_t kGap = 256;

unsigned char* arena = nullptr;
uint8_t* states = nullptr;
Cell* cells = nullptr;
uintptr_t library_base = 0;
size_t global_used = 0;
size_t shared_next = 0;

struct Region {
  size_t bytes;
  std::string name;
};
std::map<size_t, Region> regions;  // by offset; kept after the end of a block for the report

struct PoisonRead {
  uint32_t site;
  int count;
  std::string first;
};
std::map<uint32_t, PoisonRead> poison;

struct Closed {
  size_t offset;
  std::vector<uint8_t> states;
};
std::vector<Closed> closed;

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    std::fprintf(stderr, "simt: cannot reserve %zu bytes of address space\n", bytes);
    std::abort();
  }
  madvise(p, bytes, MADV_HUGEPAGE);  // a wish: the records of accesses spread over many pages
  return p;
}

// Tells AddressSanitizer, in builds that have it, what may be accessed.
void open_region([[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(arena + offset, bytes);
#endif
}
void close_region([[maybe_unused]] size_t offset, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(arena + offset, bytes);
#endif
}

size_t offset_of(const void* address) { return static_cast<size_t>(static_cast<const unsigned char*>(address) - arena); }

std::string describe(const void* address) {
  const size_t offset = offset_of(address);
  auto it = regions.upper_bound(offset);
  if (it == regions.begin()) return "an address outside every buffer";
  --it;
  const size_t into = offset - it->first;
  const std::string& name = it->second.name;
  if (into < it->second.bytes) {
    return "byte " + std::to_string(into) + " of " + name + " (" + std::to_string(it->second.bytes) + " bytes)" +
           (states[offset] == kUnmapped ? ", a block that has ended" : "");
  }
  std::string text = std::to_string(into - it->second.bytes) + " bytes past the end of " + name + " (" +
                     std::to_string(it->second.bytes) + " bytes)";
  auto next = std::next(it);
  if (next != regions.end() && next->first - offset < kGap) {
    text += ", " + std::to_string(next->first - offset) + " bytes before " + next->second.name;
  }
  return text;
}

// Whether every byte is kDefined, the state of most that are accessed.
inline bool all_defined(const uint8_t* state, size_t bytes) {
  constexpr uint64_t kEight = 0x0101010101010101u * kDefined;
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, state + i, 8);
    if (eight != kEight) return false;
  }
  for (; i < bytes; ++i) {
    if (state[i] != kDefined) return false;
  }
  return true;
}

std::string access_name(unsigned kind, size_t bytes) {
  std::string text = kind & kAsync ? "asynchronous " : kind & kAtomic ? "atomic " : "";
  return text + (kind & kWrite ? "write" : "read") + " of " + std::to_string(bytes) + " bytes";
}

[[noreturn]] void race(Thread& thread, const Access& other, bool other_writes, const void* address, size_t bytes,
                       unsigned kind, uintptr_t pc) {
  std::string text = access_name(kind, bytes) + " by " + thread.name() + " at " + where(pc) + " and " +
                     (other.async    ? "asynchronous "
                      : other.atomic ? "atomic "
                                     : "") +
                     (other_writes ? "write" : "read") + " by " + access_thread_name(other) + " at " +
                     where_site(other.site) + " are unordered, at " + describe(address);
  fault("data race", text, pc);
}

// Whether `other` happens before what `thread` does now.
inline bool ordered(const Thread& thread, const Access& other, bool plain_write) {
  if (other.grid != thread.grid_number) return other.grid <= thread.visible_grid;
  if (other.tid == thread.tid) return true;
  if (other.tid == thread.agent && other.clock <= thread.agent_seen) return true;
  return knows(thread.base, other.tid, other.clock) || (!plain_write && knows(thread.weak, other.tid, other.clock));
}

inline bool conflicts(const Thread& thread, const Access& other, bool other_writes, unsigned kind) {
  return other.grid != 0 && !((kind & kAtomic) && other.atomic) && !ordered(thread, other, other_writes && !other.async);
}

void check_cell(Thread& thread, Cell& cell, const Access& me, unsigned kind, const void* address, size_t bytes,
                uintptr_t pc) {
  if (conflicts(thread, cell.write, true, kind)) race(thread, cell.write, true, address, bytes, kind, pc);
  if (kind & kWrite) {
    for (Access& read : cell.reads) {
      if (conflicts(thread, read, false, kind)) race(thread, read, false, address, bytes, kind, pc);
      read.grid = 0;
    }
    cell.write = me;
    return;
  }
  for (Access& read : cell.reads) {
    if (read.grid == 0 || (read.grid == me.grid && read.tid == me.tid && read.async == me.async) ||
        ordered(thread, read, true)) {
      read = me;
      return;
    }
  }
  cell.reads[next_random() % 3] = me;
}
}  // namespace

void memory_init() {
  if (arena) return;
  arena = static_cast<unsigned char*>(reserve(kArenaBytes));
  states = static_cast<uint8_t*>(reserve(kArenaBytes + 64));
  cells = static_cast<Cell*>(reserve(kArenaBytes / 2 * sizeof(Cell)));
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&memory_init), &info)) library_base = reinterpret_cast<uintptr_t>(info.dli_fbase);
}

void mark(void* address, size_t bytes, ByteState state) { std::memset(states + offset_of(address), state, bytes); }

void* global_alloc(size_t bytes, const std::string& name) {
  memory_init();
  const size_t offset = global_used + kGap;
  const size_t end = (offset + bytes + kGap - 1) / kGap * kGap;
  if (end > kGlobalBytes) return nullptr;
  close_region(global_used, end - global_used);
  open_region(offset, bytes);
  global_used = end;
  regions[offset] = {bytes, name};
  std::memset(arena + offset, kPoisonByte, bytes);
  std::memset(states + offset, kPoison, bytes);
  return arena + offset;
}

void global_free_all() {
  memory_init();
  closed.clear();
  regions.clear();
  std::memset(states, kUnmapped, global_used);
  std::memset(static_cast<void*>(cells), 0, global_used / 2 * sizeof(Cell));
  std::memset(states + kGlobalBytes, kUnmapped, shared_next);
  global_used = shared_next = 0;
}

void close(void* address, size_t bytes) {
  const size_t offset = offset_of(address);
  closed.push_back({offset, {states + offset, states + offset + bytes}});
  std::memset(states + offset, kClosed, bytes);
}

void open_all() {
  for (; !closed.empty(); closed.pop_back()) {
    std::memcpy(states + closed.back().offset, closed.back().states.data(), closed.back().states.size());
  }
}

unsigned char* shared_alloc(size_t bytes, const std::string& name) {
  const size_t size = (bytes + 2 * kGap - 1) / kGap * kGap;
  if (shared_next + size > kSharedBytes) {
    shared_next = 0;
    regions.erase(regions.lower_bound(kGlobalBytes), regions.end());
  }
  const size_t offset = kGlobalBytes + shared_next;
  shared_next += size;
  close_region(offset, size);
  open_region(offset, bytes);
  regions[offset] = {bytes, name};
  std::memset(arena + offset, kPoisonByte, bytes);
  std::memset(states + offset, kPoison, bytes);
  std::memset(static_cast<void*>(cells + offset / 2), 0, (bytes + 1) / 2 * sizeof(Cell));
  return arena + offset;
}

void shared_free(unsigned char* base, size_t bytes) {
  std::memset(states + offset_of(base), kUnmapped, bytes);
  close_region(offset_of(base), bytes);
}

size_t count_state(const void* address, size_t bytes, ByteState state) {
  size_t count = 0;
  const uint8_t* s = states + offset_of(address);
  for (size_t i = 0; i < bytes; ++i) count += s[i] == state;
  return count;
}

bool in_arena(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(arena) < kArenaBytes;
}
bool in_shared(const void* address) { return in_arena(address) && offset_of(address) >= kGlobalBytes; }

uint32_t shared_window(const void* address) { return static_cast<uint32_t>(offset_of(address) - kGlobalBytes); }
unsigned char* from_window(uint32_t address) { return arena + kGlobalBytes + address; }
bool is_mapped(const void* address, size_t bytes) {
  return in_arena(address) && std::memchr(states + offset_of(address), kUnmapped, bytes) == nullptr;
}

uint32_t site_of(uintptr_t pc) { return static_cast<uint32_t>(pc - library_base); }
std::string where_site(uint32_t site) {
  char text[32];
  std::snprintf(text, sizeof text, "{pc:%x}", site);
  return text;
}
std::string where(uintptr_t pc) { return where_site(site_of(pc)); }

void check_access(const void* address, size_t bytes, unsigned kind, uintptr_t pc) {
  if (Thread* thread = current_thread()) check_access_of(*thread, address, bytes, kind, pc);
}

void check_access_of(Thread& thread, const void* address, size_t bytes, unsigned kind, uintptr_t pc) {
  if (!in_arena(address)) {
    // A small address is a null pointer plus an offset. Others are the kernel's own locals and constants, for which nobody
    // hints.
    const bool null = reinterpret_cast<uintptr_t>(address) < 65536;
    if (null || kind & kHint) {
      fault("out of bounds",
            access_name(kind, bytes) + " by " + thread.name() + " at " + where(pc) +
                (null ? " through a null pointer" : ", far from all memory of the device"),
            pc);
    }
    return;
  }
  const size_t offset = offset_of(address);
  if (!(kind & kUnaligned) && offset % (bytes ? bytes & -bytes : 1) != 0) {
    fault("misaligned access",
          access_name(kind, bytes) + " by " + thread.name() + " at " + where(pc) + ", at " + describe(address), pc);
  }
  uint8_t* state = states + offset;
  bool poisoned = false;
  const size_t unusual = all_defined(state, bytes) ? 0 : bytes;
  for (size_t i = 0; i < unusual; ++i) {
    if (state[i] == kUnmapped) {
      fault("out of bounds",
            access_name(kind, bytes) + " by " + thread.name() + " at " + where(pc) + ": " +
                describe(static_cast<const unsigned char*>(address) + i),
            pc);
    }
    if (state[i] == kClosed && !(kind & kHint)) {
      fault("data race",
            access_name(kind, bytes) + " by " + thread.name() + " at " + where(pc) +
                " of what another stream may be writing, " + describe(static_cast<const unsigned char*>(address) + i),
            pc);
    }
    poisoned |= state[i] == kPoison;
  }
  if (kind & kHint) return;
  if (poisoned) {
    if (kind & kWrite) {
      std::memset(state, kDefined, bytes);
    } else {
      PoisonRead& entry = poison[site_of(pc)];
      if (entry.count++ == 0) entry.first = thread.name() + " at " + where(pc) + ", " + describe(address);
    }
  }
  Access me{};
  me.grid = thread.grid_number;
  me.tid = kind & kPush ? thread.block->grid->pusher : kind & kAsync ? thread.agent : thread.tid;
  me.atomic = (kind & kAtomic) != 0;
  me.async = (kind & kAsync) != 0;
  me.clock = kind & kPush ? UINT32_MAX : kind & kAsync ? thread.agent_clock : thread.clock;
  me.site = site_of(pc);
  for (size_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; ++cell) {
    check_cell(thread, cells[cell], me, kind, address, bytes, pc);
  }
}

void note_landed(const void* address, size_t bytes, uint32_t grid, uint32_t pusher, uint32_t tid, uint32_t clock) {
  const size_t offset = offset_of(address);
  for (size_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; ++cell) {
    Access& write = cells[cell].write;
    if (write.grid != grid || write.tid != pusher) continue;
    write.tid = tid;
    write.clock = clock;
  }
}

std::string poison_reads() {
  std::string text;
  for (const auto& [site, entry] : poison) {
    if (!text.empty()) text += "; ";
    text += entry.first;
    if (entry.count > 1) text += " (and " + std::to_string(entry.count - 1) + " more there)";
  }
  return text;
}
void forget_poison_reads() { poison.clear(); }

}  // namespace simt_host
