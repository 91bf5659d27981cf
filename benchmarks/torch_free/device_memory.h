// Memory of the device, and waiting for it. tests/simt/torch_free/device_memory.h has the same names for the simulated
// device, and comes first on the include path there.
#pragma once
#include <algorithm>
#include <functional>
#include <launch.cuh>
#include <string>
#include <vector>

namespace torch_free {

// Frees what it gave.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* p : all_) (void)cudaFree(p);
  }
  // 0xff: NaN in every dtype.
  void* take(size_t bytes, int fill = 0xff) {
    void* p = nullptr;
    fused_rnn::simt::check(cudaMalloc(&p, std::max<size_t>(bytes, 16)), "memory");
    all_.push_back(p);
    fused_rnn::simt::check(cudaMemset(p, fill, std::max<size_t>(bytes, 16)), "memory");
    return p;
  }
  void* put(const void* from, size_t bytes) {
    void* const p = take(bytes);
    fused_rnn::simt::check(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice), "copy");
    return p;
  }

 private:
  std::vector<void*> all_;
};

// Memory with what `from` holds: `to`, written in the stream's order.
inline void* copied(void* to, const void* from, size_t bytes, void* stream) {
  fused_rnn::simt::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)),
                         "copy");
  return to;
}
inline void wait(const std::string& what) { fused_rnn::simt::check(cudaDeviceSynchronize(), what); }
inline std::vector<unsigned char> fetch(const void* p, size_t bytes) {
  std::vector<unsigned char> v(bytes);
  fused_rnn::simt::check(cudaMemcpy(v.data(), p, bytes, cudaMemcpyDeviceToHost), "copy");
  return v;
}
// Calls what launches kernels.
inline void run(const std::function<void()>& launches) { launches(); }

}  // namespace torch_free
