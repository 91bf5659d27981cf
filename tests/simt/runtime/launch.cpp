// The conditions under which a device refuses a launch, and meetings at different places of the source.
#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

#include "device.h"

namespace simt_host {

namespace {
std::set<std::pair<uint32_t, uint32_t>> meetings;
std::string first_meeting;
std::map<const void*, int> prepared;
std::set<const void*> large_clusters;
Loader loader = nullptr;
}  // namespace

KernelCode code_of(const void* kernel) {
  KernelCode code{};
  if (loader && !loader(site_of(reinterpret_cast<uintptr_t>(kernel)), &code)) {
    throw std::runtime_error("the loader has no code for this kernel");
  }
  return code;
}
void set_loader(Loader new_loader) { loader = new_loader; }

void check_launch(const LaunchSpec& s) {
  const std::string what = "kernel " + s.name + ", grid " + std::to_string(s.grid.x) + "x" + std::to_string(s.grid.y) + "x" +
                           std::to_string(s.grid.z) + ", " + std::to_string(s.threads) + " threads, " +
                           std::to_string(s.smem_bytes) + " bytes of shared memory";
  const auto refuse = [&](const std::string& error, const std::string& why) {
    throw std::runtime_error("fused_rnn: " + what + ": " + error + " (" + why + ")");
  };
  if (s.grid.x < 1 || s.grid.y < 1 || s.grid.z < 1 || s.grid.y > 65535 || s.grid.z > 65535) {
    refuse("invalid configuration argument", "grid dimensions are 1..2^31-1, 1..65535, 1..65535");
  }
  if (s.threads < 1 || s.threads > 1024) refuse("invalid configuration argument", "a block has 1..1024 threads");
  if (s.smem_bytes < 0 || s.smem_bytes > limits.smem_per_block) {
    refuse("invalid argument", "a block has at most " + std::to_string(limits.smem_per_block) + " bytes of shared memory");
  }
  if (s.smem_bytes > 48 * 1024 && prepared_smem(s.kernel) < s.smem_bytes) {
    refuse("invalid argument", "more than 48 KiB of shared memory needs cudaFuncAttributeMaxDynamicSharedMemorySize first");
  }
  if (s.cluster > 1) {
    if (limits.compute_capability < 90) refuse("invalid argument", "clusters need sm_90");
    if (s.grid.x % s.cluster != 0) refuse("invalid cluster size", "grid x is not a multiple of the cluster");
    if (s.cluster > limits.max_cluster) {
      refuse("invalid cluster size", "the device has clusters of at most " + std::to_string(limits.max_cluster));
    }
    if (s.cluster > 8 && !large_clusters.count(s.kernel)) {
      refuse("invalid cluster size", "more than 8 blocks need cudaFuncAttributeNonPortableClusterSizeAllowed");
    }
  }
  const int by_threads = limits.threads_per_sm / s.threads;
  const int by_smem = s.smem_bytes ? limits.smem_per_sm / (s.smem_bytes + 1024) : by_threads;
  const int64_t fit = int64_t{std::min(by_threads, by_smem)} * limits.sm_count;
  if (s.cluster > fit) {
    refuse(
        "too many resources requested for launch",
        std::to_string(s.cluster) + " blocks of a cluster run at the same time, " + "and " + std::to_string(fit) + " fit");
  }
  if (s.cooperative) {
    const int64_t blocks = int64_t{s.grid.x} * s.grid.y * s.grid.z;
    if (blocks > fit) {
      refuse("too many blocks in cooperative launch", std::to_string(blocks) + ", and " + std::to_string(fit) + " fit");
    }
  }
}

void prepare_kernel(const void* kernel, const std::string& name, int smem_bytes) {
  if (smem_bytes > limits.smem_per_block) {
    throw std::runtime_error("fused_rnn: kernel " + name + ": " + std::to_string(smem_bytes) +
                             " bytes of shared memory: invalid argument (a block has at most " +
                             std::to_string(limits.smem_per_block) + ")");
  }
  int& bytes = prepared[kernel];
  bytes = std::max({bytes, smem_bytes, 48 * 1024});
}
int prepared_smem(const void* kernel) {
  const auto it = prepared.find(kernel);
  return it == prepared.end() ? 48 * 1024 : it->second;
}
void allow_large_clusters(const void* kernel) { large_clusters.insert(kernel); }
void forget_prepared() {
  prepared.clear();
  large_clusters.clear();
}

void note_meeting(uintptr_t a, uintptr_t b, const Thread& thread) {
  if (a == b) return;
  if (!meetings.insert({site_of(a), site_of(b)}).second) return;
  if (first_meeting.size() < 4000) first_meeting += thread.name() + " at " + where(b) + " with others at " + where(a) + "\n";
}
std::string meetings_text() { return first_meeting; }
void forget_meetings() {
  meetings.clear();
  first_meeting.clear();
}

}  // namespace simt_host
