// Number formats and tensor-core instructions of the simulated device, by the fragment tables of the PTX manual
// (sections "Matrix fragments for mma.m16n8k8", "... m16n8k16" and "ldmatrix").
#pragma once
#include <cstdint>

namespace simt_host {

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);  // nearest, ties to even
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);  // nearest, ties to even
uint32_t float_to_tf32(float value);      // nearest, ties away from zero, 10 bits

enum class MmaType { kF16, kBf16, kTf32 };
// d[4] += a[a_words] b[b_words], of shape 16 x 8 x k.
void mma(MmaType type, int k, float* d, const uint32_t* a, const uint32_t* b, uintptr_t pc);
void ldmatrix(bool transpose, int count, uint32_t* r, const void* row, uintptr_t pc);

}  // namespace simt_host
