// csrc/cuda/backend.h on the simulated device, for torch's CPU tensors: their memory comes from the simulator's, so that
// kernels may touch it, and every call runs its launches before it returns. The library's path is in FUSED_RNN_SIMT_LIBRARY.
#include "cuda/backend.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/recent.h"
#include "cublas.h"

namespace fused_rnn::cuda {
namespace {

template <class F>
F* simulator(const char* name) {
  static void* const library = dlopen(std::getenv("FUSED_RNN_SIMT_LIBRARY"), RTLD_NOW);
  void* const function = library ? dlsym(library, name) : nullptr;
  if (!function) throw std::runtime_error(dlerror());
  return reinterpret_cast<F*>(function);
}

constexpr DeviceInfo kDevice{90, 132, 227 << 10, 228 << 10, 65536, 2048, 50 << 20, 16, 90};

// Memory that has been freed is kept by its size: the simulator only frees all of it at once.
class Memory : public c10::Allocator {
 public:
  Memory() {
    const int limits[] = {kDevice.compute_capability, kDevice.sm_count,       kDevice.smem_per_block, kDevice.smem_per_sm,
                          kDevice.registers_per_sm,   kDevice.threads_per_sm, kDevice.max_cluster};
    simulator<void()>("simt_reset")();
    simulator<void(uint64_t)>("simt_seed")(1);
    simulator<void(const int*)>("simt_device")(limits);
    c10::SetCPUAllocator(this, /*priority=*/255);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    bytes = (bytes + 255) / 256 * 256;
    std::vector<void*>& free = free_[bytes];
    void* memory = nullptr;
    if (free.empty()) {
      memory = simulator<void*(size_t, const char*, const void*)>("simt_alloc")(bytes, "tensor", nullptr);
      if (!memory) throw std::bad_alloc();
      sizes_[memory] = bytes;
    } else {
      memory = free.back();
      free.pop_back();
    }
    std::memset(memory, 0xff, bytes);  // NaN
    return {memory, memory, &Memory::put_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Memory::put_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void put_back(void* memory);
  std::map<size_t, std::vector<void*>> free_;
  std::map<void*, size_t> sizes_;
};
Memory& memory = *new Memory;  // outlives all tensors
void Memory::put_back(void* address) { memory.free_[memory.sizes_.at(address)].push_back(address); }

int calls = 0, calls_for_steps = 0, tangent_calls = 0, dual_calls = 0;
int flag_writes = 0;
unsigned refused = 0;  // a bit for each family whose launches the device refuses
bool old_driver = false;

void launch(const Plan& plan) {
  if (refused >> static_cast<int>(plan.family) & 1) throw LaunchRefused("too many blocks in cooperative launch");
}

void check(int status) {
  if (status == 0) return;
  rethrow_of_product();
  const auto text = [](const char* name) { return std::string(simulator<const char*()>(name)()); };
  throw std::runtime_error(text("simt_kind") + ": " + text("simt_message"));
}

}  // namespace

const DeviceInfo& device_info(int) { return kDevice; }
bool conditional_graphs_take_cooperative_launches() { return !old_driver; }
Problem problem_of(const ForwardParams& params) {
  Problem problem;
  simulator<void(const ForwardParams*, Problem*)>("simt_problem_forward")(&params, &problem);
  return problem;
}
Problem problem_of(const BackwardParams& params) {
  Problem problem;
  simulator<void(const BackwardParams*, Problem*)>("simt_problem_backward")(&params, &problem);
  return problem;
}
Problem problem_of(const DualBackwardParams& params) {
  Problem problem;
  simulator<void(const DualBackwardParams*, Problem*)>("simt_problem_dual_backward")(&params, &problem);
  return problem;
}
const Plan& plan_for(const Problem& problem, int device, const FamilyChoice& choice) {
  static Recent<std::tuple<Problem, int, FamilyChoice>, Plan, 16> kept;
  return kept.get({problem, device, choice}, [&] { return make_plan(problem, kDevice, choice); });
}

void write_integers(int64_t* to, const int64_t* integers, int64_t count, void*) {
  check(simulator<int(int64_t*, const int64_t*, int64_t)>("simt_write_integers")(to, integers, count));
}

void write_flags(bool* to, const bool* flags, int64_t count, void*) {
  ++flag_writes;
  check(simulator<int(bool*, const bool*, int64_t)>("simt_write_flags")(to, flags, count));
}

void previous_rows(const PreviousParams& params, void*) {
  check(simulator<int(const PreviousParams*)>("simt_previous_rows")(&params));
}

void forward(const ForwardParams& params, const Plan& plan, void*) {
  launch(plan);
  ++calls;
  if (params.primal) ++tangent_calls;
  check(simulator<int(const ForwardParams*, const Plan*)>("simt_forward")(&params, &plan));
}
void backward(const BackwardParams& params, const Plan& plan, void*) {
  launch(plan);
  ++calls;
  check(simulator<int(const BackwardParams*, const Plan*)>("simt_backward")(&params, &plan));
}
void dual_backward(const DualBackwardParams& params, const Plan& plan, void*) {
  launch(plan);
  ++calls, ++dual_calls;
  check(simulator<int(const DualBackwardParams*, const Plan*)>("simt_dual_backward")(&params, &plan));
}
void forward_steps(const ForwardParams& params, const Plan& plan, const StepRange& range, void*) {
  launch(plan);
  ++calls_for_steps;
  const auto run = simulator<int(const ForwardParams*, const Plan*, const int64_t*, int, float*)>("simt_forward_steps");
  check(run(&params, &plan, &range.first, 1, range.carry));
}
void backward_steps(const BackwardParams& params, const Plan& plan, const StepRange& range, void*) {
  launch(plan);
  ++calls_for_steps;
  const auto run = simulator<int(const BackwardParams*, const Plan*, const int64_t*, int, float*)>("simt_backward_steps");
  check(run(&params, &plan, &range.first, 1, range.carry));
}

}  // namespace fused_rnn::cuda

// From now on the device refuses launches of these families, a bit for each; whether its driver is older than CUDA 12.6.
extern "C" __attribute__((visibility("default"))) void torch_host_device(unsigned refused, bool old_driver) {
  fused_rnn::cuda::refused = refused;
  fused_rnn::cuda::old_driver = old_driver;
}

// How many times flags of the host have become the device's.
extern "C" __attribute__((visibility("default"))) int torch_host_flag_writes() { return fused_rnn::cuda::flag_writes; }

// How many of the calls for layers have been scans of tangents and of dual numbers.
extern "C" __attribute__((visibility("default"))) void torch_host_second_order_calls(int* counts) {
  counts[0] = fused_rnn::cuda::tangent_calls;
  counts[1] = fused_rnn::cuda::dual_calls;
}

// How many calls there have been, for layers as a whole and for some of their steps.
extern "C" __attribute__((visibility("default"))) void torch_host_calls(int* counts) {
  counts[0] = fused_rnn::cuda::calls;
  counts[1] = fused_rnn::cuda::calls_for_steps;
}
