// Vectors of 16 bytes, the widest access of a thread, and their float32 numbers.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "element.h"

namespace llama_te {

// Two 16-bit numbers of one register; the first is in the low half.
template <ElementType kElement>
struct Pair;

template <>
struct Pair<ElementType::kBFloat16> {
    static __device__ float2 unpack(unsigned pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U));
    }
    static __device__ unsigned pack(float first, float second) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
        return *reinterpret_cast<const unsigned *>(&pair);
    }
};

template <>
struct Pair<ElementType::kFloat16> {
    static __device__ float2 unpack(unsigned pair) {
        return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
    }
    static __device__ unsigned pack(float first, float second) {
        const __half2 pair = __floats2half2_rn(first, second);
        return *reinterpret_cast<const unsigned *>(&pair);
    }
};

template <ElementType kElement>
struct Vector {
    static constexpr int kElements = 8;

    static __device__ void unpack(const uint4 &packed, float (&values)[kElements]) {
        const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = Pair<kElement>::unpack(words[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }

    static __device__ uint4 pack(const float (&values)[kElements]) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = Pair<kElement>::pack(values[2 * i], values[2 * i + 1]);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};

template <>
struct Vector<ElementType::kFloat32> {
    static constexpr int kElements = 4;

    static __device__ void unpack(const uint4 &packed, float (&values)[kElements]) {
        values[0] = __uint_as_float(packed.x);
        values[1] = __uint_as_float(packed.y);
        values[2] = __uint_as_float(packed.z);
        values[3] = __uint_as_float(packed.w);
    }

    static __device__ uint4 pack(const float (&values)[kElements]) {
        return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                          __float_as_uint(values[3]));
    }
};

}  // namespace llama_te
