// Stand-in for torch's header. On CUDA a wait for an event that was never recorded is no wait: here it is an error.
#pragma once
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

namespace at::cuda {
class CUDAEvent {
 public:
  CUDAEvent() = default;
  CUDAEvent(CUDAEvent&& other) noexcept : recorded_(other.recorded_) {}
  CUDAEvent& operator=(CUDAEvent&& other) noexcept {
    recorded_ = other.recorded_;
    return *this;
  }
  void record(const c10::cuda::CUDAStream&) { recorded_ = true; }
  void block(const c10::cuda::CUDAStream&) { TORCH_CHECK(recorded_, "awaited an event that was never recorded"); }

 private:
  bool recorded_ = false;
};
}  // namespace at::cuda
