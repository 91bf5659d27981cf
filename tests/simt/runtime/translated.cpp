#include "translated.h"

#include <string>

#include "../include/simt.cuh"
#include "device.h"

namespace simt_ptx {

using simt_host::context;
using simt_host::current_thread;

namespace {
std::string here(uintptr_t pc) { return current_thread()->name() + " at " + simt_host::where(pc); }
}  // namespace

unsigned char* shared_memory(uint32_t address, unsigned bytes, unsigned kind, uintptr_t pc) {
  unsigned char* const p = context.smem + address;
  // An address of a peer's memory would be one of the block's own, far beyond its end.
  const auto size = static_cast<uint32_t>(current_thread()->block->grid->spec.smem_bytes);
  if (address > size || bytes > size - address) {
    simt_host::fault("out of bounds",
                     here(pc) + ": byte " + std::to_string(address) + " of " + std::to_string(size) + " of shared memory",
                     pc);
  }
  simt_host::note_access(pc);
  simt_host::check_access(p, bytes, kind, pc);
  return p;
}

unsigned char* global_memory(uint64_t address, unsigned bytes, unsigned kind, uintptr_t pc) {
  auto* const p = reinterpret_cast<unsigned char*>(address);
  if (!simt_host::in_arena(p) || simt_host::in_shared(p)) {
    simt_host::fault("out of bounds", here(pc) + ": an address that is not in global memory", pc);
  }
  simt_host::note_access(pc);
  simt_host::check_access(p, bytes, kind, pc);
  return p;
}

namespace {
bool within(const unsigned char* data, uint64_t size, uint64_t address, unsigned bytes) {
  const uint64_t offset = address - reinterpret_cast<uintptr_t>(data);
  return offset <= size && bytes <= size - offset;
}
}  // namespace

unsigned char* local_memory(const Params& params, uint64_t address, unsigned bytes, unsigned, uintptr_t pc) {
  if (!within(params.local, params.local_bytes, address, bytes)) {
    simt_host::fault("out of bounds", here(pc) + ": an address that is not in the thread's local memory", pc);
  }
  return reinterpret_cast<unsigned char*>(address);
}

unsigned char* generic_memory(const Params& params, uint64_t address, unsigned bytes, unsigned kind, uintptr_t pc) {
  if (within(params.local, params.local_bytes, address, bytes) ||
      (within(params.data, params.bytes, address, bytes) && !(kind & simt_host::kWrite))) {
    return reinterpret_cast<unsigned char*>(address);
  }
  auto* const p = reinterpret_cast<unsigned char*>(address);
  if (simt_host::in_shared(p)) {
    const uint64_t shared = generic_to_shared(address);
    return shared_memory(shared >> 32 ? ~0u : static_cast<uint32_t>(shared), bytes, kind, pc);
  }
  return global_memory(address, bytes, kind, pc);
}

uint64_t shared_to_generic(uint64_t address) { return reinterpret_cast<uintptr_t>(context.smem) + address; }
uint64_t generic_to_shared(uint64_t address) { return address - reinterpret_cast<uintptr_t>(context.smem); }

void prefetch(uint64_t address, uintptr_t pc) {
  simt_host::check_access(reinterpret_cast<const void*>(address), 1, simt_host::kRead | simt_host::kHint, pc);
}

void store_flag(uint64_t to, const void* data, unsigned bytes, bool release, uintptr_t pc) {
  auto* const p = reinterpret_cast<unsigned char*>(to);
  if (!simt_host::in_arena(p)) {
    simt_host::fault("out of bounds", here(pc) + ": an address that is not in global memory", pc);
  }
  simt_host::store_flag(p, data, static_cast<int>(bytes), release, pc);
}

void load_flags(void* result, uint64_t from, unsigned bytes, unsigned count, bool acquire, uintptr_t pc) {
  auto* const p = reinterpret_cast<unsigned char*>(from);
  if (!simt_host::in_arena(p)) {
    simt_host::fault("out of bounds", here(pc) + ": an address that is not in global memory", pc);
  }
  if (from % (bytes * count) != 0) simt_host::check_access(p, bytes * count, simt_host::kRead | simt_host::kAtomic, pc);
  for (unsigned i = 0; i < count; ++i) {
    simt_host::load_flag(static_cast<unsigned char*>(result) + i * bytes, p + i * bytes, static_cast<int>(bytes), acquire,
                         pc);
  }
}

void copy_async(uint32_t to, uint64_t from, int bytes, uint32_t source_bytes, uintptr_t pc) {
  simt_host::copy_async(context.smem + to, reinterpret_cast<const void*>(from), bytes, static_cast<int>(source_bytes), pc);
}
void ldmatrix(bool transpose, int count, uint32_t* r, uint32_t row, uintptr_t pc) {
  simt_host::ldmatrix(transpose, count, r, context.smem + row, pc);
}

namespace {
struct Lane {
  uint32_t value, result;
  uint32_t source;  // lane
};
void complete_shuffle(void** payload) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* const mine = static_cast<Lane*>(payload[lane]);
    if (!mine) continue;
    const auto* const source = static_cast<const Lane*>(payload[mine->source]);
    // Of a lane that takes no part, the value is undefined: NaN.
    mine->result = source ? source->value : ~0u;
  }
}
void complete_ballot(void** payload) {
  uint32_t all = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (payload[lane]) all |= (static_cast<Lane*>(payload[lane])->value & 1u) << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (payload[lane]) static_cast<Lane*>(payload[lane])->result = all;
  }
}
}  // namespace

uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, bool* valid, uintptr_t pc) {
  const uint32_t lane = static_cast<uint32_t>(context.thread_x) % 32, segment = clamp >> 8 & 31, b = by & 31;
  const uint32_t first = lane & segment, last = first | (clamp & 31 & ~segment);
  uint32_t source = lane;
  bool in_range = false;
  switch (mode) {
    case Shuffle::kIdx:
      source = first | (b & ~segment);
      in_range = source <= last;
      break;
    case Shuffle::kBfly:
      source = lane ^ b;
      in_range = source <= last;
      break;
    case Shuffle::kUp:
      source = lane - b;
      in_range = static_cast<int>(lane) - static_cast<int>(b) >= static_cast<int>(last);
      break;
    case Shuffle::kDown:
      source = lane + b;
      in_range = source <= last;
      break;
  }
  Lane payload{value, 0, in_range ? source : lane};
  static constexpr const char* kNames[] = {"shfl.sync.idx", "shfl.sync.bfly", "shfl.sync.up", "shfl.sync.down"};
  simt_host::warp_collective(kNames[static_cast<int>(mode)], mask, &payload, complete_shuffle, false, pc);
  if (valid) *valid = in_range;
  return payload.result;
}

uint32_t ballot(bool predicate, uint32_t mask, uintptr_t pc) {
  Lane payload{predicate, 0, 0};
  simt_host::warp_collective("vote.sync.ballot", mask, &payload, complete_ballot, false, pc);
  return payload.result;
}
void sync_warp(uint32_t mask, uintptr_t pc) {
  simt_host::warp_collective("bar.warp.sync", mask, nullptr, nullptr, true, pc);
}
bool barrier_any(uint32_t id, uint32_t threads, bool predicate, uintptr_t pc) {
  simt_host::barrier(static_cast<int>(id), static_cast<int>(threads), &predicate, pc);
  return predicate;
}

uint32_t map_to_rank(uint32_t address, uint32_t rank, uintptr_t pc) {
  return simt_host::map_to_rank(context.smem + address, static_cast<int>(rank), pc);
}
uint64_t* mbarrier_at(uint32_t address) { return reinterpret_cast<uint64_t*>(context.smem + address); }

void cluster_arrive(bool& arrived, uintptr_t pc) {
  if (arrived) simt_host::fault("bad barrier", here(pc) + ": arrives twice at the cluster's barrier", pc);
  arrived = true;
}
void cluster_wait(bool& arrived, uintptr_t pc) {
  if (!arrived) simt_host::fault("bad barrier", here(pc) + ": waits at the cluster's barrier before it arrives", pc);
  arrived = false;
  simt_host::sync_cluster(pc);
}

void stop(const char* what, uintptr_t pc) { simt_host::fault("trap", here(pc) + ": " + what, pc); }

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    auto byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7)) & 255);
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

uint32_t funnel_shift(bool left, bool wrap, uint32_t low, uint32_t high, uint32_t by) {
  const uint32_t n = wrap ? by & 31 : by < 32 ? by : 32;
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<uint32_t>(left ? (both << n) >> 32 : both >> n);
}

float exp2(float x) { return fused_rnn::simt::exp2(x); }
float reciprocal(float x) { return fused_rnn::simt::reciprocal(x); }
float fma_down(float a, float b, float c) {
  const float nearest = std::fma(a, b, c);
  const double product = double(a) * b;  // exact
  const double sum = product + c, part = sum - product;
  const double lost = (product - (sum - part)) + (c - part);  // the exact value is sum + lost
  if (sum == 0 && lost == 0) return std::signbit(product) || std::signbit(c) ? -0.0f : 0.0f;
  return (sum - nearest) + lost < 0 ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}
double reciprocal(double x) {
  constexpr uint64_t kUpper = ~uint64_t{0xffffffff};
  constexpr double kSmallest = 0x1p-1022;
  const auto upper = [](double value) { return bits<double>(bits<uint64_t>(value) & kUpper); };
  const double rounded = upper(x);
  if (std::fabs(rounded) < kSmallest) return std::copysign(std::numeric_limits<double>::infinity(), x);
  const double result = 1 / rounded;
  return std::fabs(result) < kSmallest ? std::copysign(0.0, x) : upper(result);
}

}  // namespace simt_ptx
