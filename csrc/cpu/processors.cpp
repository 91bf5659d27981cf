#include "cpu/processors.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <ctime>
#include <fstream>
#include <sstream>

#ifdef __linux__
#include <sched.h>
#endif

namespace fused_rnn::cpu {
namespace {

// Processors of a quota in microseconds for each period; 0: no limit.
int from_quota(double quota, double period) {
  return quota > 0 && period > 0 ? static_cast<int>(std::min(std::ceil(quota / period), 1e6)) : 0;
}

int quota_of_group(const std::string& folder, bool version2) {
  double quota = 0, period = 0;
  if (version2) {
    std::ifstream(folder + "/cpu.max") >> quota >> period;  // "max 100000" is no number
  } else {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  return from_quota(quota, period);
}

// The least of a group and those above it.
int quota_of_path(const std::string& root, std::string path, bool version2) {
  int least = 0;
  while (true) {
    const int quota = quota_of_group(root + path, version2);
    if (quota > 0) least = least > 0 ? std::min(least, quota) : quota;
    if (path.empty()) return least;
    path.erase(std::min(path.rfind('/'), path.size() - 1));
  }
}

bool has_controller(const std::string& controllers, const std::string& wanted) {
  std::istringstream all(controllers);
  for (std::string one; std::getline(all, one, ',');) {
    if (one == wanted) return true;
  }
  return false;
}

#ifdef __linux__
int quota_of_process() {
  std::ostringstream groups;
  groups << std::ifstream("/proc/self/cgroup").rdbuf();
  return processors_of_groups(groups.str(), "/sys/fs/cgroup");
}

// Processors that the calling thread may run on.
int affinity() {
  for (int count = CPU_SETSIZE; count <= 1 << 20; count *= 2) {  // the system refuses a set smaller than its own
    cpu_set_t* const set = CPU_ALLOC(count);
    if (!set) return INT_MAX;
    const size_t size = CPU_ALLOC_SIZE(count);
    const bool known = sched_getaffinity(0, size, set) == 0;
    const int processors = known ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (known) return processors;
  }
  return INT_MAX;
}
#endif

}  // namespace

int processors_of_groups(const std::string& groups, const std::string& mount) {
  int least = 0;
  std::istringstream lines(groups);
  for (std::string line; std::getline(lines, line);) {  // number:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool version2 = controllers.empty();
    if (!version2 && !has_controller(controllers, "cpu")) continue;
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    for (const char* root : {"", "/cpu", "/cpu,cpuacct", "/unified"}) {
      const int quota = quota_of_path(mount + root, path, version2);
      if (quota > 0) least = least > 0 ? std::min(least, quota) : quota;
    }
  }
  return least;
}

int processors() {
#ifdef __linux__
  static const int quota = quota_of_process();
  struct Known {
    double until = 0;
    int count = 1;
  };
  static thread_local Known known;
  constexpr double kSeconds = 0.1;
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
  const double now = static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  if (now >= known.until) {
    const int count = affinity();
    known = {now + kSeconds, std::max(quota > 0 ? std::min(count, quota) : count, 1)};
  }
  return known.count;
#else
  return INT_MAX;
#endif
}

}  // namespace fused_rnn::cpu
