// What kernels translated from PTX (../ptx) call for each instruction that is no plain arithmetic. Addresses of shared
// memory are offsets in the block's own, `generic` ones are the host's. `pc` numbers the instruction, for reports.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "api.h"
#include "tensor.h"

namespace simt_ptx {

// What registers hold before they are written.
constexpr float kUnset32 = std::numeric_limits<float>::quiet_NaN();
constexpr double kUnset64 = std::numeric_limits<double>::quiet_NaN();

// The kernel's parameters and the thread's local memory, which generic addresses may point to.
struct Params {
  const unsigned char* data;
  uint64_t bytes;
  unsigned char* local;
  uint64_t local_bytes;
};

// Where the bytes lie, after the checks of the simulator; `kind` as in simt_host::AccessKind.
unsigned char* shared_memory(uint32_t address, unsigned bytes, unsigned kind, uintptr_t pc);
unsigned char* global_memory(uint64_t address, unsigned bytes, unsigned kind, uintptr_t pc);
unsigned char* local_memory(const Params& params, uint64_t address, unsigned bytes, unsigned kind, uintptr_t pc);
// Of an address that may also be one of the parameters, of shared or of local memory.
unsigned char* generic_memory(const Params& params, uint64_t address, unsigned bytes, unsigned kind, uintptr_t pc);

// Addresses are only computed: whether there is memory, its user checks.
uint64_t shared_to_generic(uint64_t address);
uint64_t generic_to_shared(uint64_t address);
template <class T>
inline T load(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline void store(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}
void prefetch(uint64_t address, uintptr_t pc);

// Words of memory that other blocks poll; `count` neighbours, each of them whole.
void store_flag(uint64_t to, const void* data, unsigned bytes, bool release, uintptr_t pc);
void load_flags(void* result, uint64_t from, unsigned bytes, unsigned count, bool acquire, uintptr_t pc);

void copy_async(uint32_t to, uint64_t from, int bytes, uint32_t source_bytes, uintptr_t pc);
void ldmatrix(bool transpose, int count, uint32_t* r, uint32_t row, uintptr_t pc);

// shfl.sync: clamp is the operand c of the PTX manual. Returns the value; *valid: whether the source lane was in range.
enum class Shuffle { kIdx, kBfly, kUp, kDown };
uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, bool* valid, uintptr_t pc);
uint32_t ballot(bool predicate, uint32_t mask, uintptr_t pc);
void sync_warp(uint32_t mask, uintptr_t pc);
// bar.red.or, and: the threads' common answer.
bool barrier_any(uint32_t id, uint32_t threads, bool predicate, uintptr_t pc);

uint32_t map_to_rank(uint32_t address, uint32_t rank, uintptr_t pc);
uint64_t* mbarrier_at(uint32_t address);

// The two halves of the cluster's barrier. `arrived`: whether the thread has called the first half and not yet the second.
void cluster_arrive(bool& arrived, uintptr_t pc);
void cluster_wait(bool& arrived, uintptr_t pc);

// What __trap() and an instruction that the translation holds for unreachable do.
[[noreturn]] void stop(const char* what, uintptr_t pc);

// Shifts by more than the width of the type, as in PTX.
template <class T>
inline T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T(0) : T(a << by);
}
template <class T>
inline T shift_right(T a, uint32_t by) {
  if (by >= sizeof(T) * 8) return a < T(0) ? T(-1) : T(0);
  return T(a >> by);
}
// bfi: the lowest `count` bits of a, in the place of those of b from `at` on.
template <class T>
inline T insert_bits(T a, T b, uint32_t at, uint32_t count) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  at &= 255, count &= 255;
  if (at >= kBits || count == 0) return b;
  const T ones = count >= kBits ? T(~T(0)) : T((T(1) << count) - 1);
  const T mask = T(ones << at);
  return T((b & ~mask) | ((a << at) & mask));
}
// bfe: `count` bits of a from `at` on, with its sign if the type is signed.
template <class T>
inline T extract_bits(T a, uint32_t at, uint32_t count) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  at &= 255, count &= 255;
  if (count == 0) return T(0);
  const uint32_t last = at + count - 1 < kBits - 1 ? at + count - 1 : kBits - 1;
  const bool negative = T(-1) < T(0) && (a >> last & 1);
  T result = negative ? T(-1) : T(0);
  if (at >= kBits) return result;
  result = shift_right<T>(a, at);
  const uint32_t bits = last - at + 1;
  if (bits < kBits) {
    const T mask = T((T(1) << bits) - 1);
    result = negative ? T(result | ~mask) : T(result & mask);
  }
  return result;
}
// prmt.b32: four bytes of a and b by the nibbles of `selector`; a nibble's highest bit repeats the byte's sign.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector);
// shf: the upper or lower word of a shift of the 64 bits high:low.
uint32_t funnel_shift(bool left, bool wrap, uint32_t low, uint32_t high, uint32_t by);

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ex2.approx.ftz.f32 and rcp.approx.ftz.f32, with errors of the size that the device's have.
float exp2(float x);
float reciprocal(float x);
// rcp.approx.ftz.f64: of the upper half of x, to the upper half of a double.
double reciprocal(double x);
// cvt.sat: into [0, 1]; NaN becomes 0.
inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// fma.rm: the largest float that is not above a * b + c.
float fma_down(float a, float b, float c);
// Conversions to integers clamp, and NaN becomes 0.
template <class To, class From>
inline To to_integer(From value) {
  if (value != value) return To(0);
  constexpr To kLowest = To(-1) < To(0) ? To(To(1) << (sizeof(To) * 8 - 1)) : To(0);
  constexpr To kHighest = To(~kLowest);
  if (value <= From(kLowest)) return kLowest;
  if (value >= From(kHighest)) return kHighest;
  return To(value);
}

}  // namespace simt_ptx
