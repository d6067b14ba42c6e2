// e4m3 on the GPU: vectors of bfloat16 to e4m3 and back.

#pragma once

#include <cuda_fp8.h>

#include "vector.cuh"

namespace llama_te {

constexpr int kPackedElements = Vector<ElementType::kBFloat16>::kElements;

// Multiplies 8 numbers by `inverse` and rounds them to e4m3. NaN stays NaN.
__device__ inline uint2 quantized(const uint4 &vector, float inverse) {
    float values[kPackedElements];
    Vector<ElementType::kBFloat16>::unpack(vector, values);
    unsigned pairs[kPackedElements / 2];
#pragma unroll
    for (int i = 0; i < kPackedElements / 2; ++i) {
        const float2 pair = make_float2(values[2 * i] * inverse, values[2 * i + 1] * inverse);
        pairs[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

// The bits of the greatest magnitude of 8 numbers, as float32. Infinity, and then NaN, are above all numbers.
__device__ inline unsigned greatest_bits_of(const uint4 &vector) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
    unsigned greatest = 0;
#pragma unroll
    for (const unsigned word : words) {
        greatest = max(greatest, max(word << 16 & 0x7fff0000U, word & 0x7fff0000U));
    }
    return greatest;
}

// Expands four e4m3 to two pairs of bfloat16, of bytes 0 and 2 and of bytes 1 and 3. The exponent, 4 bits with a bias of
// 7, becomes the low bits of an exponent of 8 bits with a bias of 127: the result is the value times 2^-120, exactly.
// e4m3's NaN becomes a number.
__device__ inline void expand_fp8(unsigned four, unsigned &even, unsigned &odd) {
    even = ((four << 8) & 0x80008000U) | ((four << 4) & 0x07f007f0U);
    odd = (four & 0x80008000U) | ((four >> 4) & 0x07f007f0U);
}

// Where expanded e4m3 is one factor of a product, the other factor takes half of the factor 2^120 back, which keeps all
// products far from the ends of the range, and the sum takes the rest.
constexpr unsigned kFactorOfPair = 0x5d805d80;             // 2^60 as bfloat16, twice
constexpr float kFactorOfSum = 1.152921504606846976e18F;  // 2^60

__device__ inline unsigned multiply_pairs(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

}  // namespace llama_te
