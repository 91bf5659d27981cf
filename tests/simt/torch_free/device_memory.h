// The names of benchmarks/torch_free/device_memory.h for the simulated device, whose memory is the host's.
#pragma once
#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../runtime/capi.h"

extern "C" {
void* simt_alloc(size_t bytes, const char* name, const void* contents);
const char* simt_message();
const char* simt_kind();
}

namespace torch_free {

struct Memory {
  void* take(size_t bytes, int = 0xff) { return simt_alloc(std::max<size_t>(bytes, 16), "memory", nullptr); }
  void* put(const void* from, size_t bytes) { return simt_alloc(bytes, "input", from); }
};

inline void* copied(void*, const void* from, size_t bytes, void*) { return simt_alloc(bytes, "copy", from); }
inline void wait(const std::string&) {}
inline std::vector<unsigned char> fetch(const void* p, size_t bytes) {
  std::vector<unsigned char> v(bytes);
  std::memcpy(v.data(), p, bytes);
  return v;
}
inline void run(const std::function<void()>& launches) {
  if (simt_host::run_guarded(launches)) throw std::runtime_error(std::string(simt_kind()) + ": " + simt_message());
}

}  // namespace torch_free
