#include "capi.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "crash.h"
#include "device.h"

using namespace simt_host;

namespace {
std::string kind, message, answer;
}

namespace simt_host {
int run_guarded(const std::function<void()>& host_code) {
  clear_stream();
  forget_poison_reads();
  forget_meetings();
  stats = {};
  kind.clear();
  message.clear();
  try {
    host_code();
  } catch (const std::exception& e) {
    clear_stream();
    kind = "host";
    message = e.what();
    return 2;
  }
  const CrashReports reports;
  if (run_stream()) return 0;
  kind = fault_kind();
  message = fault_text();
  clear_stream();
  return 1;
}
}  // namespace simt_host

extern "C" {
// For gdb: call (void)simt_print_waiting()
void simt_print_waiting() {
  std::puts(waiting_text().c_str());
  std::puts("({pc:N} is an offset in this library: info line *((char*)simt_base() + 0xN))");
}
const void* simt_base() {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(&simt_base) -
                                       site_of(reinterpret_cast<uintptr_t>(&simt_base)));
}
void simt_reset() {
  clear_stream();
  forget_prepared();
  global_free_all();
}
void simt_unmap_stacks() { unmap_free_stacks(); }
void simt_set_loader(Loader loader) { set_loader(loader); }
void simt_seed(uint64_t seed) { set_seed(seed); }
void simt_device(const int* fields) { std::memcpy(&limits, fields, sizeof limits); }
void* simt_alloc(size_t bytes, const char* name, const void* contents) {
  void* p = global_alloc(bytes, name);
  if (p && contents) {
    std::memcpy(p, contents, bytes);
    mark(p, bytes, kDefined);
  }
  return p;
}
void simt_close(void* address, size_t bytes) { close(address, bytes); }
void simt_open_all() { open_all(); }
size_t simt_unwritten(const void* address, size_t bytes) { return count_state(address, bytes, kPoison); }
const char* simt_kind() { return kind.c_str(); }
const char* simt_message() { return message.c_str(); }
const char* simt_poison_reads() { return (answer = poison_reads()).c_str(); }
const char* simt_meetings() { return (answer = meetings_text()).c_str(); }
void simt_stats(uint64_t* out) { std::memcpy(out, &stats, sizeof stats); }
}
