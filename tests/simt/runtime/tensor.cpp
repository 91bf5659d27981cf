#include "tensor.h"

#include <cstring>

#include "device.h"

namespace simt_host {

namespace {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace

float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023u;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and beyond round to infinity
  if (magnitude < 0x38800000u) {                       // below the least normal number: adding 0.5 rounds at the right bit
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

uint32_t float_to_tf32(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

namespace {
struct MmaArgs {
  MmaType type;
  int k;
  float* d;
  const uint32_t *a, *b;
};

float element16(MmaType type, uint32_t word, int high) {
  const auto bits = static_cast<uint16_t>(high ? word >> 16 : word);
  return type == MmaType::kBf16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

void complete_mma(void** payload) {
  float a[16][16], b[16][8];
  const auto& first = *static_cast<MmaArgs*>(payload[0]);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& args = *static_cast<MmaArgs*>(payload[lane]);
    const int group = lane / 4, in_group = lane % 4;
    if (first.type == MmaType::kTf32) {  // the tensor core ignores the low 13 bits
      for (int i = 0; i < 4; ++i) {
        a[group + (i % 2) * 8][in_group + (i / 2) * 4] = bit_cast<float>(args.a[i] & ~0x1fffu);
      }
      for (int i = 0; i < 2; ++i) b[in_group + i * 4][group] = bit_cast<float>(args.b[i] & ~0x1fffu);
    } else {
      for (int i = 0; i < first.k / 4; ++i) {
        for (int e = 0; e < 2; ++e) {
          a[group + (i % 2) * 8][in_group * 2 + e + (i / 2) * 8] = element16(first.type, args.a[i], e);
        }
      }
      for (int i = 0; i < first.k / 8; ++i) {
        for (int e = 0; e < 2; ++e) b[in_group * 2 + e + i * 8][group] = element16(first.type, args.b[i], e);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& args = *static_cast<MmaArgs*>(payload[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
      float sum = args.d[i];
      for (int k = 0; k < first.k; ++k) sum += a[row][k] * b[k][column];
      args.d[i] = sum;
    }
  }
}

struct LdmatrixArgs {
  bool transpose;
  int count;
  uint32_t* r;
  const unsigned char* row;
};

void complete_ldmatrix(void** payload) {
  const auto& first = *static_cast<LdmatrixArgs*>(payload[0]);
  for (int m = 0; m < first.count; ++m) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(element[row], static_cast<LdmatrixArgs*>(payload[8 * m + row])->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = first.transpose ? element[column][row] : element[row][column];
      const uint32_t high = first.transpose ? element[column + 1][row] : element[row][column + 1];
      static_cast<LdmatrixArgs*>(payload[lane])->r[m] = low | high << 16;
    }
  }
}
}  // namespace

void mma(MmaType type, int k, float* d, const uint32_t* a, const uint32_t* b, uintptr_t pc) {
  MmaArgs args{type, k, d, a, b};
  warp_collective(type == MmaType::kF16    ? "mma f16"
                  : type == MmaType::kBf16 ? "mma bf16"
                                           : "mma tf32",
                  0xffffffffu, &args, complete_mma, false, pc);
}

void ldmatrix(bool transpose, int count, uint32_t* r, const void* row, uintptr_t pc) {
  Thread* me = current_thread();
  if (me->index % 32 < 8 * count) {
    if (!in_shared(row)) {
      fault("out of bounds", me->name() + " at " + where(pc) + ": ldmatrix of an address that is not in shared memory", pc);
    }
    check_access_of(*me, row, 16, kRead, pc);
  }
  LdmatrixArgs args{transpose, count, r, static_cast<const unsigned char*>(row)};
  warp_collective("ldmatrix", 0xffffffffu, &args, complete_ldmatrix, false, pc);
}

}  // namespace simt_host
