// How many processors the process may use: its affinity, and the quota of its control groups.
#pragma once
#include <string>

namespace fused_rnn::cpu {

// Processors that the calling thread may run on now, at most what the quota allows when the process asks first, at least 1.
// The affinity is asked again after 0.1 s.
int processors();

// Processors' worth of time that the control groups of a process allow, rounded up; 0: no limit, or no control groups.
// `groups`: what /proc/self/cgroup holds; `mount`: where the groups are mounted, /sys/fs/cgroup. Version 2 has cpu.max in
// every group, version 1 cpu.cfs_quota_us and cpu.cfs_period_us under cpu or cpu,cpuacct. A group and those above it all
// count; in a container whose own group is mounted as the root, a path that is not there stands for the root.
int processors_of_groups(const std::string& groups, const std::string& mount);

}  // namespace fused_rnn::cpu
