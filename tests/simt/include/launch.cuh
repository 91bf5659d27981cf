// Host implementation of csrc/cuda/device/launch.cuh: the same names and signatures, on the simulated device of
// tests/simt/runtime.
#pragma once
#include <cstdint>
#include <utility>

#include "../runtime/api.h"
#include "plan/device_info.h"
#include "simt.cuh"

namespace fused_rnn::simt {

struct LaunchConfig {
  const char* name;
  int grid_x, grid_y, grid_z;
  int threads;
  int smem_bytes;
  int cluster;
  bool pdl;
  bool cooperative;
};

template <class Params>
void prepare(void (*kernel)(Params), const char* name, int smem_bytes) {
  simt_host::prepare_kernel(reinterpret_cast<const void*>(kernel), name, smem_bytes);
}

template <class Params>
void allow_large_clusters(void (*kernel)(Params), const char*) {
  simt_host::allow_large_clusters(reinterpret_cast<const void*>(kernel));
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchConfig& config, void*, const Params& params) {
  simt_host::LaunchSpec spec{};
  spec.name = config.name;
  spec.grid = {config.grid_x, config.grid_y, config.grid_z};
  spec.threads = config.threads;
  spec.smem_bytes = config.smem_bytes;
  spec.cluster = config.cluster;
  spec.pdl = config.pdl;
  spec.cooperative = config.cooperative;
  spec.kernel = reinterpret_cast<const void*>(kernel);
  spec.body = [kernel, params, code = simt_host::code_of(spec.kernel)] {
    code.run ? code.run(reinterpret_cast<const unsigned char*>(&params), code.pc) : kernel(params);
  };
  simt_host::enqueue(std::move(spec));
}

inline DeviceInfo query_device(int) {
  const simt_host::Limits& l = simt_host::limits;
  return {l.compute_capability, l.sm_count,         l.smem_per_block,
          l.smem_per_sm,        l.registers_per_sm, l.threads_per_sm,
          int64_t{50} << 20,    l.max_cluster,      0};
}
inline int driver_version() { return 13000; }
template <class Params>
void query_code(DeviceInfo& info, int, void (*)(Params), int) {
  info.compiled_for = arch() / 10;
  info.resident_blocks = info.sm_count;
  for (int blocks = 1; blocks <= info.max_cluster; ++blocks) info.active_clusters[blocks] = info.sm_count / blocks;
}

}  // namespace fused_rnn::simt
