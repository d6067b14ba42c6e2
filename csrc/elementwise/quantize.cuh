// Rounding a row of bfloat16 numbers to FP8, with a scale of its own.

#pragma once

#include "elementwise/quantize_rows.h"
#include "include/e4m3.cuh"
#include "include/warp.cuh"

namespace llama_te {

__device__ inline float greatest_of(const uint4 &vector) {
    float values[kPackedElements];
    Vector<ElementType::kBFloat16>::unpack(vector, values);
    float greatest = 0.0F;
#pragma unroll
    for (int i = 0; i < kPackedElements; ++i) {
        greatest = fmaxf(greatest, fabsf(values[i]));  // of a number and NaN the number
    }
    return greatest;
}

template <int kThreads>
__device__ float greatest_of_block(float value) {
    // Numbers that are not negative have the order of their bits.
    const unsigned bits = __reduce_max_sync(kWholeWarp, __float_as_uint(value));
    __shared__ unsigned greatest_of_warp[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
        greatest_of_warp[threadIdx.x / kWarp] = bits;
    }
    __syncthreads();
    unsigned greatest = 0;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) {
        greatest = max(greatest, greatest_of_warp[i]);
    }
    return __uint_as_float(greatest);
}

// Stores a row's scale, and returns what multiplies its numbers before they are rounded. Rows of zeros, and rows whose
// factor would be infinite, become zeros.
__device__ inline float store_scale(float greatest, const Quantization &to, int row) {
    const bool is_zero = greatest < kLeastGreatest;
    if (threadIdx.x == 0) {
        const float scale = is_zero ? 0.0F : __fdiv_rn(greatest, kGreatestE4M3);
        to.scales[row] = to.factor == nullptr ? scale : scale * *to.factor;
    }
    return is_zero ? 0.0F : __fdiv_rn(kGreatestE4M3, greatest);
}

}  // namespace llama_te
