// Rotary embedding on the GPU: 16 bytes of a head at a time, in float32.

#pragma once

#include "vector.cuh"

namespace llama_te {

template <int kElements>
__device__ void load_floats(const char *from, float (&values)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
        const float4 four = *reinterpret_cast<const float4 *>(from + i * sizeof(float));
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
    }
}

// a * b - c * d and a * b + c * d in float32, at most 1.5 units in the last place off (Kahan): the rounding error of
// c * d is computed exactly and added back. Without that, a result near 0 would have few correct bits. The kernels are
// bound by memory, so this arithmetic costs no time. The intrinsics keep the compiler from contracting it.
inline __device__ float difference_of_products(float a, float b, float c, float d) {
    const float product = __fmul_rn(c, d);
    const float lost = __fmaf_rn(c, d, -product);
    return __fsub_rn(__fmaf_rn(a, b, -product), lost);
}

inline __device__ float sum_of_products(float a, float b, float c, float d) {
    const float product = __fmul_rn(c, d);
    const float lost = __fmaf_rn(c, d, -product);
    return __fadd_rn(__fmaf_rn(a, b, product), lost);
}

// Rotates a vector of the first half of a head and the vector at the same place of the second half.
template <ElementType kElement>
__device__ void rotate(uint4 &first, uint4 &second, const float (&cosine)[Vector<kElement>::kElements],
                       const float (&sine)[Vector<kElement>::kElements]) {
    using Packed = Vector<kElement>;
    float x[Packed::kElements];
    float y[Packed::kElements];
    Packed::unpack(first, x);
    Packed::unpack(second, y);
#pragma unroll
    for (int i = 0; i < Packed::kElements; ++i) {
        const float before = x[i];
        x[i] = difference_of_products(before, cosine[i], y[i], sine[i]);
        y[i] = sum_of_products(y[i], cosine[i], before, sine[i]);
    }
    first = Packed::pack(x);
    second = Packed::pack(y);
}

}  // namespace llama_te
