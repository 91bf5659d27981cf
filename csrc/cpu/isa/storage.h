// Storage types of the four dtypes, and their conversions to and from the arithmetic type in plain C++ (round to nearest
// even).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/params.h"

namespace fused_rnn::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
static_assert(sizeof(Half) == 2 && sizeof(BFloat16) == 2);

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline double to_arithmetic(double v) { return v; }
inline float to_arithmetic(float v) { return v; }
inline float to_arithmetic(BFloat16 v) { return bits_to_float(uint32_t{v.bits} << 16); }
inline float to_arithmetic(Half v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  // Normal and subnormal alike: place the exponent and the fraction, then correct the bias by an exact product with 2^112.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void store_converted(double v, double* out) { *out = v; }
inline void store_converted(float v, float* out) { *out = v; }
inline void store_converted(float v, BFloat16* out) {
  const uint32_t bits = float_to_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
inline void store_converted(float v, Half* out) {
  const uint32_t bits = float_to_bits(v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    out->bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to at least 2^16
    out->bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
    out->bits = sign | static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  } else {
    out->bits = sign | static_cast<uint16_t>((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13);
  }
}

// The type that a storage type is computed in.
template <class Storage>
using Arithmetic = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Calls f(Storage{}) for the storage type of a dtype.
template <class F>
auto dispatch_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat16: return f(Half{});
    case DType::kBFloat16: return f(BFloat16{});
    case DType::kFloat32: break;
  }
  return f(float{});
}

// The address of element `index` of an array whose elements have `element_size` bytes; null stays null.
inline const void* stored_at(const void* base, int64_t index, int64_t element_size) {
  return base ? static_cast<const char*>(base) + index * element_size : nullptr;
}
inline void* stored_at(void* base, int64_t index, int64_t element_size) {
  return base ? static_cast<char*>(base) + index * element_size : nullptr;
}

}  // namespace fused_rnn::cpu
