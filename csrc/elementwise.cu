// What lies between the products of a layer, on the GPU.
//
// Both kernels let the next one begin only after their own wait, so that it finds all that came before them in memory.

#include "elementwise.h"

#include "launch.cuh"
#include "vector.cuh"
#include "warp.cuh"

namespace llama_te {

namespace {

using Packed = Vector<ElementType::kBFloat16>;
constexpr int kVectorElements = Packed::kElements;

// A row's block holds this many vectors per thread, enough for 8,192 features; what is behind them it reads twice.
constexpr int kNormThreads = 256;
constexpr int kHeld = 4;

constexpr int kSwigluThreads = 128;
constexpr int kSwigluVectors = 2;

__device__ uint4 add(const uint4 &one, const uint4 &other) {
    float sum[kVectorElements];
    float addend[kVectorElements];
    Packed::unpack(one, sum);
    Packed::unpack(other, addend);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        sum[i] += addend[i];
    }
    return Packed::pack(sum);
}

__device__ float sum_of_squares(const uint4 &vector) {
    float values[kVectorElements];
    Packed::unpack(vector, values);
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        sum += values[i] * values[i];
    }
    return sum;
}

__device__ uint4 scale(const uint4 &vector, float factor, const uint4 &weight) {
    float values[kVectorElements];
    float weights[kVectorElements];
    Packed::unpack(vector, values);
    Packed::unpack(weight, weights);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        values[i] = values[i] * factor * weights[i];
    }
    return Packed::pack(values);
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
            float values[kVectorElements];
            float factors[kVectorElements];
            Packed::unpack(gates[i], values);
            Packed::unpack(ups[i], factors);
#pragma unroll
            for (int j = 0; j < kVectorElements; ++j) {
                const float x = values[j];
                values[j] = __fdividef(x, 1.0F + __expf(-x)) * factors[j];
            }
            output[at] = Packed::pack(values);
        }
    }
}

}  // namespace

void rms_norm_cuda(const RmsNormArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto kernel = arguments.addend == nullptr ? rms_norm_kernel<false> : rms_norm_kernel<true>;
    launch_overlapping(kernel, {dim3(arguments.rows), dim3(kNormThreads)}, reinterpret_cast<cudaStream_t>(stream),
                       "rms_norm", arguments);
}

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    constexpr int kElements = kSwigluThreads * kSwigluVectors * kVectorElements;
    const auto blocks = static_cast<unsigned>((arguments.features + std::int64_t{kElements} - 1) / kElements);
    launch_overlapping(swiglu_kernel, {dim3(arguments.rows, blocks), dim3(kSwigluThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "swiglu", arguments);
}

}  // namespace llama_te
