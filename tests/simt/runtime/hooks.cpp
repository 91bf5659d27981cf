// What g++ -fsanitize=thread calls at every plain memory access of the instrumented sources: here they lead to the
// simulator's own checks instead of libtsan.
#include <cstddef>
#include <cstdint>

#include "access.h"
#include "device.h"

namespace {
inline void access(const void* address, size_t bytes, unsigned kind, void* pc) {
  if (simt_host::current_thread()) {
    const auto place = reinterpret_cast<uintptr_t>(pc) - 1;
    simt_host::note_access(place);
    simt_host::check_access(address, bytes, kind, place);
  }
}
}  // namespace

#define HOOK(name, bytes, kind) \
  extern "C" void __tsan_##name(void* address) { access(address, bytes, kind, __builtin_return_address(0)); }

using simt_host::kRead;
using simt_host::kUnaligned;
using simt_host::kWrite;

HOOK(read1, 1, kRead)
HOOK(read2, 2, kRead)
HOOK(read4, 4, kRead)
HOOK(read8, 8, kRead)
HOOK(read16, 16, kRead)
HOOK(write1, 1, kWrite)
HOOK(write2, 2, kWrite)
HOOK(write4, 4, kWrite)
HOOK(write8, 8, kWrite)
HOOK(write16, 16, kWrite)
HOOK(unaligned_read2, 2, kRead | kUnaligned)
HOOK(unaligned_read4, 4, kRead | kUnaligned)
HOOK(unaligned_read8, 8, kRead | kUnaligned)
HOOK(unaligned_read16, 16, kRead | kUnaligned)
HOOK(unaligned_write2, 2, kWrite | kUnaligned)
HOOK(unaligned_write4, 4, kWrite | kUnaligned)
HOOK(unaligned_write8, 8, kWrite | kUnaligned)
HOOK(unaligned_write16, 16, kWrite | kUnaligned)
#undef HOOK

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) {
  if (bytes) access(address, bytes, kRead | kUnaligned, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  if (bytes) access(address, bytes, kWrite | kUnaligned, __builtin_return_address(0));
}
}
