// What lies between the products of a layer, on the GPU.
//
// Both kernels let the next one begin only after their own wait, so that it finds all that came before them in memory.

#include "elementwise.h"

#include <cuda_bf16.h>

#include "launch.cuh"

namespace llama_te {

namespace {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;
constexpr int kVectorElements = 8;

// A row's block holds this many vectors per thread, enough for 8,192 features; what is behind them it reads twice.
constexpr int kNormThreads = 256;
constexpr int kHeld = 4;

constexpr int kSwigluThreads = 128;
constexpr int kSwigluVectors = 2;

struct Values {
    float at[kVectorElements];
};

__device__ Values widen(const uint4 &vector) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
    Values values;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values.at[2 * i] = __uint_as_float(words[i] << 16);
        values.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
    }
    return values;
}

__device__ uint4 round_to_bf16(const Values &values) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values.at[2 * i], values.at[2 * i + 1]);
        words[i] = *reinterpret_cast<const unsigned *>(&pair);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ uint4 add(const uint4 &one, const uint4 &other) {
    Values sum = widen(one);
    const Values addend = widen(other);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        sum.at[i] += addend.at[i];
    }
    return round_to_bf16(sum);
}

__device__ float sum_of_squares(const uint4 &vector) {
    const Values values = widen(vector);
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        sum += values.at[i] * values.at[i];
    }
    return sum;
}

__device__ uint4 scale(const uint4 &vector, float factor, const uint4 &weight) {
    Values values = widen(vector);
    const Values weights = widen(weight);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        values.at[i] = values.at[i] * factor * weights.at[i];
    }
    return round_to_bf16(values);
}

__device__ float sum_of_block(float value) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kWholeWarp, value, distance);
    }
    __shared__ float of_warps[kNormThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
        of_warps[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kNormThreads / kWarp; ++i) {
        sum += of_warps[i];
    }
    return sum;
}

// A block takes a row.
template <bool kAdds>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(const __grid_constant__ RmsNormArguments a) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    const int vectors = a.features / kVectorElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    uint4 *hidden = reinterpret_cast<uint4 *>(a.hidden) + start;
    const uint4 *addend = reinterpret_cast<const uint4 *>(a.addend) + start;
    const uint4 *weight = reinterpret_cast<const uint4 *>(a.weight);
    uint4 *output = reinterpret_cast<uint4 *>(a.output) + start;

    // Loads only, so that all are on their way together.
    uint4 held[kHeld] = {};
    uint4 addends[kHeld] = {};
    uint4 weights[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kNormThreads;
        if (at < vectors) {
            held[i] = __ldcg(hidden + at);
            if constexpr (kAdds) {
                addends[i] = __ldcg(addend + at);
            }
            weights[i] = __ldg(weight + at);
        }
    }
    float squares = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if constexpr (kAdds) {
            held[i] = add(held[i], addends[i]);
        }
        squares += sum_of_squares(held[i]);
    }
    const auto sum_at = [&](int at) {
        const uint4 vector = __ldcg(hidden + at);
        return kAdds ? add(vector, __ldcg(addend + at)) : vector;
    };
    for (int at = threadIdx.x + kHeld * kNormThreads; at < vectors; at += kNormThreads) {
        squares += sum_of_squares(sum_at(at));
    }
    const float factor = rsqrtf(sum_of_block(squares) / static_cast<float>(a.features) + a.epsilon);

    const auto write = [&](int at, const uint4 &sum, const uint4 &weight_vector) {
        if constexpr (kAdds) {
            hidden[at] = sum;
        }
        output[at] = scale(sum, factor, weight_vector);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kNormThreads;
        if (at < vectors) {
            write(at, held[i], weights[i]);
        }
    }
    for (int at = threadIdx.x + kHeld * kNormThreads; at < vectors; at += kNormThreads) {
        write(at, sum_at(at), __ldg(weight + at));
    }
}

// A block takes a part of a row.
__global__ void __launch_bounds__(kSwigluThreads) swiglu_kernel(const __grid_constant__ SwigluArguments a) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    const int vectors = a.features / kVectorElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    const uint4 *gate = reinterpret_cast<const uint4 *>(a.input) + 2 * start;
    const uint4 *up = gate + vectors;
    uint4 *output = reinterpret_cast<uint4 *>(a.output) + start;
    const int first = blockIdx.y * kSwigluThreads * kSwigluVectors + threadIdx.x;

    uint4 gates[kSwigluVectors];
    uint4 ups[kSwigluVectors];
#pragma unroll
    for (int i = 0; i < kSwigluVectors; ++i) {
        const int at = first + i * kSwigluThreads;
        if (at < vectors) {
            gates[i] = __ldcg(gate + at);
            ups[i] = __ldcg(up + at);
        }
    }
#pragma unroll
    for (int i = 0; i < kSwigluVectors; ++i) {
        const int at = first + i * kSwigluThreads;
        if (at < vectors) {
            Values values = widen(gates[i]);
            const Values factors = widen(ups[i]);
#pragma unroll
            for (int j = 0; j < kVectorElements; ++j) {
                const float x = values.at[j];
                values.at[j] = __fdividef(x, 1.0F + __expf(-x)) * factors.at[j];
            }
            output[at] = round_to_bf16(values);
        }
    }
}

}  // namespace

void rms_norm_cuda(const RmsNormArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto kernel = arguments.addend == nullptr ? rms_norm_kernel<false> : rms_norm_kernel<true>;
    launch_overlapping(kernel, arguments, dim3(arguments.rows), kNormThreads, reinterpret_cast<cudaStream_t>(stream),
                       "rms_norm");
}

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    constexpr int kElements = kSwigluThreads * kSwigluVectors * kVectorElements;
    const auto blocks = static_cast<unsigned>((arguments.features + std::int64_t{kElements} - 1) / kElements);
    launch_overlapping(swiglu_kernel, arguments, dim3(arguments.rows, blocks), kSwigluThreads,
                       reinterpret_cast<cudaStream_t>(stream), "swiglu");
}

}  // namespace llama_te
