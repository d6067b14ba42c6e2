// e4m3 on the GPU: vectors of bfloat16 to e4m3 and back.

#pragma once

#include <cuda_fp8.h>

#include "vector.cuh"

namespace llama_te {

constexpr int kPackedElements = Vector<ElementType::kBFloat16>::kElements;

// Multiplies two numbers by `inverse` and rounds them to e4m3. NaN stays NaN.
__device__ inline unsigned quantized_pair(unsigned packed, float inverse) {
    const float2 pair = Pair<ElementType::kBFloat16>::unpack(packed);
    return __nv_cvt_float2_to_fp8x2(make_float2(pair.x * inverse, pair.y * inverse), __NV_SATFINITE, __NV_E4M3);
}

// The same for 8 numbers.
__device__ inline uint2 quantized(const uint4 &vector, float inverse) {
    return make_uint2(quantized_pair(vector.x, inverse) | quantized_pair(vector.y, inverse) << 16,
                      quantized_pair(vector.z, inverse) | quantized_pair(vector.w, inverse) << 16);
}

// The bits of the greatest magnitude of two numbers, as float32. Infinity, and then NaN, are above all numbers.
__device__ inline unsigned greatest_bits_of(unsigned pair) {
    return max(pair << 16 & 0x7fff0000U, pair & 0x7fff0000U);
}

// The same for 8 numbers.
__device__ inline unsigned greatest_bits_of(const uint4 &vector) {
    return max(max(greatest_bits_of(vector.x), greatest_bits_of(vector.y)),
               max(greatest_bits_of(vector.z), greatest_bits_of(vector.w)));
}

// The bits of `ones` where `mask` is 1, and those of `zeros` elsewhere. In C++ the compiler would rewrite the operations
// of expand_fp8 into more.
__device__ inline unsigned select_bits(unsigned mask, unsigned ones, unsigned zeros) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(ones), "r"(zeros), "r"(mask));
    return result;
}

// Expands four e4m3 to two pairs of bfloat16, of bytes 0 and 2 and of bytes 1 and 3. The exponent, 4 bits with a bias of
// 7, becomes the low bits of an exponent of 8 bits with a bias of 127: the result is the value times 2^-120, exactly.
// e4m3's NaN becomes a number.
__device__ inline void expand_fp8(unsigned four, unsigned &even, unsigned &odd) {
    constexpr unsigned kMagnitudes = 0x07f007f0;  // they cover the signs of the other pair
    const unsigned signs = select_bits(0x80808080U, four, 0);
    even = select_bits(kMagnitudes, four << 4, signs << 8);
    odd = select_bits(kMagnitudes, four >> 4, signs);
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
