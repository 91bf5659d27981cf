// Loading and launching by CUDA's driver.
#include "cuda/formula/driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <type_traits>

#include "cuda/device/refused.h"

namespace fused_rnn::cuda {
namespace {

// What cuda.h says of the driver's interface (tests/test_formula_cuda.py compares where there is one).
struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    int allowed;
    unsigned cluster[3];
  } value;
};
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, smem_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
constexpr int kCooperative = 2;                      // CUlaunchAttributeID
constexpr int kClusterDimension = 4;                 // CUlaunchAttributeID
constexpr int kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID
constexpr int kMaxDynamicSmem = 8;                   // CUfunction_attribute
constexpr int kNonPortableCluster = 14;              // CUfunction_attribute
constexpr int kMaxSmemPerBlockOptin = 97;            // CUdevice_attribute
// CUresult: the device does not take the launch.
constexpr int kNoBinary = 209;
constexpr int kOutOfResources = 701;
constexpr int kCooperativeTooLarge = 720;
constexpr int kNotSupported = 801;
constexpr int kInvalidClusterSize = 912;
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);

struct Driver {
  int (*init)(unsigned);
  int (*error_string)(int, const char**);
  int (*device_get)(int*, int);
  int (*device_attribute)(int*, int, int);
  int (*retain_context)(void**, int);
  int (*current_context)(void**);
  int (*set_context)(void*);
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*set_attribute)(void*, int, int);
  int (*launch)(const LaunchConfig*, void*, void**, void**);

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) throw std::runtime_error(std::string("CUDA's driver could not be loaded: ") + dlerror());
    const auto find = [library](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (!function) throw std::runtime_error(std::string("CUDA's driver is older than 12: it has no ") + name);
    };
    find(init, "cuInit");
    find(error_string, "cuGetErrorString");
    find(device_get, "cuDeviceGet");
    find(device_attribute, "cuDeviceGetAttribute");
    find(retain_context, "cuDevicePrimaryCtxRetain");
    find(current_context, "cuCtxGetCurrent");
    find(set_context, "cuCtxSetCurrent");
    find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction");
    find(set_attribute, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernelEx");
  }
  void check(int status, const std::string& what) const {
    if (status == 0) return;
    const char* text = nullptr;
    error_string(status, &text);
    throw std::runtime_error("fused_rnn: " + what + ": " + (text ? text : "error " + std::to_string(status)));
  }
  void check_launch(int status, const std::string& what) const {
    for (int refused : {kNoBinary, kOutOfResources, kCooperativeTooLarge, kNotSupported, kInvalidClusterSize}) {
      if (status != refused) continue;
      const char* text = nullptr;
      error_string(status, &text);
      throw LaunchRefused("fused_rnn: " + what + ": " + (text ? text : "error " + std::to_string(status)));
    }
    check(status, what);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// The runtime makes the primary context of its device the current one; a thread that has not called the runtime has none.
void ensure_context(int device) {
  const Driver& d = driver();
  const std::string what = "context of device " + std::to_string(device);
  void* context = nullptr;
  d.check(d.init(0), "CUDA's driver");
  d.check(d.current_context(&context), what);
  if (context) return;
  int handle = 0;
  d.check(d.device_get(&handle, device), what);
  d.check(d.retain_context(&context, handle), what);
  d.check(d.set_context(context), what);
}

}  // namespace

const FormulaModule::Functions& FormulaModule::functions_of(int device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = loaded_.find(device);
  if (found != loaded_.end()) return found->second;
  const Driver& d = driver();
  int handle = 0, smem_bytes = 0;
  d.check(d.device_get(&handle, device), "device " + std::to_string(device));
  d.check(d.device_attribute(&smem_bytes, kMaxSmemPerBlockOptin, handle), "device " + std::to_string(device));
  void* module = nullptr;
  d.check(d.load(&module, code_.data()), "code of a formula for device " + std::to_string(device));
  Functions functions;
  for (const Kernel& kernel : kernels_) {
    void* function = nullptr;
    d.check(d.function(&function, module, kernel.name.c_str()), "kernel " + kernel.name);
    d.check(d.set_attribute(function, kMaxDynamicSmem, smem_bytes), "shared memory of kernel " + kernel.name);
    const bool cluster = kernel.role == FormulaRole::kClusterForward || kernel.role == FormulaRole::kClusterBackward;
    if (cluster && capability_ >= 90) {  // of more than 8 blocks
      d.check(d.set_attribute(function, kNonPortableCluster, 1), "clusters of kernel " + kernel.name);
    }
    functions.push_back(function);
  }
  return loaded_[device] = std::move(functions);
}

size_t FormulaModule::place_of(const FormulaLaunch& launch) const {
  size_t place = 0;
  while (place < kernels_.size() && (kernels_[place].role != launch.role || kernels_[place].segment != launch.segment ||
                                     kernels_[place].tile != launch.tile)) {
    ++place;
  }
  return place;
}

FormulaLauncher FormulaModule::launcher(int device, void* stream) {
  ensure_context(device);
  const Functions& own = functions_of(device);  // of most launches
  return [this, &own, device, stream](const FormulaLaunch& launch, const void* arguments, size_t) {
    FormulaModule* of = this;
    size_t place = of->place_of(launch);
    while (place == of->kernels_.size()) {
      of = of->next_;
      if (!of) throw std::logic_error("the formula has no such kernel");
      place = of->place_of(launch);
    }
    const Functions& functions = of == this ? own : of->functions_of(device);
    LaunchAttribute attributes[3]{};
    LaunchConfig config{};
    config.attributes = attributes;
    if (launch.pdl) {
      LaunchAttribute& attribute = attributes[config.attribute_count++];
      attribute.id = kProgrammaticStreamSerialization;
      attribute.value.allowed = 1;
    }
    if (launch.cooperative) {
      LaunchAttribute& attribute = attributes[config.attribute_count++];
      attribute.id = kCooperative;
      attribute.value.allowed = 1;
    }
    if (launch.cluster > 1) {
      LaunchAttribute& attribute = attributes[config.attribute_count++];
      attribute.id = kClusterDimension;
      attribute.value.cluster[0] = launch.cluster;
      attribute.value.cluster[1] = attribute.value.cluster[2] = 1;
    }
    config.grid_x = launch.grid_x, config.grid_y = launch.grid_y, config.grid_z = launch.grid_z;
    config.block_x = launch.threads, config.block_y = config.block_z = 1;
    config.smem_bytes = launch.smem_bytes;
    config.stream = stream;
    void* parameters[] = {const_cast<void*>(arguments)};
    driver().check_launch(driver().launch(&config, functions[place], parameters, nullptr),
                          "kernel " + of->kernels_[place].name);
  };
}

}  // namespace fused_rnn::cuda
