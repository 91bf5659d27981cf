// How many processors the process may use: its affinity, and the quota of its control groups.
#pragma once
#include <string>

namespace fused_rnn::cpu {

// Processors that the calling thread may run on, at least 1. The affinity is read again after 0.1 s, the quota once in the
// life of the process.
int processors();

// Processors' worth of time that the control groups of a process allow, rounded up; 0: no limit, or no control groups.
// `groups` is the text of /proc/self/cgroup; `mount` is where the groups are mounted, /sys/fs/cgroup. Version 2 has cpu.max
// in every group, version 1 has cpu.cfs_quota_us and cpu.cfs_period_us under cpu or cpu,cpuacct. The least limit of a group
// and of all groups above it counts. A container may have its own group mounted as the root: a path without a folder there
// then means the root.
int processors_of_groups(const std::string& groups, const std::string& mount);

}  // namespace fused_rnn::cpu
