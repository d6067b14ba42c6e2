// RMSNorm of many rows on the GPU, with a residual's addition before it and rounding to FP8 behind
// it. A block takes a row.

#include "rms_norm.h"

#include <type_traits>

#include "elementwise/quantize.cuh"
#include "include/launch.cuh"
#include "include/vector.cuh"
#include "include/warp.cuh"

namespace llama_te {

namespace {

using Packed = Vector<ElementType::kBFloat16>;
constexpr int kVectorElements = Packed::kElements;

// A thread holds this many vectors of its row in registers, enough for 8,192 features. It reads the rest twice.
constexpr int kThreads = 256;
constexpr int kHeld = 4;

__device__ uint4 add(const uint4 &one, const uint4 &other, float factor) {
    float sum[kVectorElements];
    float addend[kVectorElements];
    Packed::unpack(one, sum);
    Packed::unpack(other, addend);
#pragma unroll
    for (int i = 0; i < kVectorElements; ++i) {
        sum[i] += addend[i] * factor;
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
    __shared__ float sum_of_warp[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
        sum_of_warp[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) {
        sum += sum_of_warp[i];
    }
    return sum;
}

template <bool kAdds, bool kQuantizes>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(const __grid_constant__ RmsNormArguments a) {
    // The next kernel starts only after this wait, so it finds everything before this kernel in memory.
    wait_for_previous_kernel();
    allow_next_kernel();
    const int vectors = a.features / kVectorElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    uint4 *hidden = reinterpret_cast<uint4 *>(a.hidden) + start;
    const uint4 *addend = reinterpret_cast<const uint4 *>(a.addend) + start;
    const uint4 *weight = reinterpret_cast<const uint4 *>(a.weight);
    auto *output = reinterpret_cast<std::conditional_t<kQuantizes, uint2, uint4> *>(a.output) + start;

    // All loads are issued before the first is used.
    const float addend_scale = kAdds && a.addend_scale != nullptr ? __ldcg(a.addend_scale + blockIdx.x) : 1.0F;
    uint4 held[kHeld] = {};
    uint4 addends[kHeld] = {};
    uint4 weights[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kThreads;
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
            held[i] = add(held[i], addends[i], addend_scale);
        }
        squares += sum_of_squares(held[i]);
    }
    const auto sum_at = [&](int at) {
        const uint4 vector = __ldcg(hidden + at);
        return kAdds ? add(vector, __ldcg(addend + at), addend_scale) : vector;
    };
    for (int at = threadIdx.x + kHeld * kThreads; at < vectors; at += kThreads) {
        squares += sum_of_squares(sum_at(at));
    }
    const float factor = rsqrtf(sum_of_block(squares) / static_cast<float>(a.features) + a.epsilon);

    float inverse = 0.0F;
    if constexpr (kQuantizes) {
        float greatest = 0.0F;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            greatest = fmaxf(greatest, greatest_of(scale(held[i], factor, weights[i])));
        }
        for (int at = threadIdx.x + kHeld * kThreads; at < vectors; at += kThreads) {
            greatest = fmaxf(greatest, greatest_of(scale(sum_at(at), factor, __ldg(weight + at))));
        }
        inverse = store_scale(greatest_of_block<kThreads>(greatest), a.to, blockIdx.x);
    }
    const auto write = [&](int at, const uint4 &sum, const uint4 &weight_vector) {
        if constexpr (kAdds) {
            hidden[at] = sum;
        }
        if constexpr (kQuantizes) {
            output[at] = quantized(scale(sum, factor, weight_vector), inverse);
        } else {
            output[at] = scale(sum, factor, weight_vector);
        }
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at < vectors) {
            write(at, held[i], weights[i]);
        }
    }
    for (int at = threadIdx.x + kHeld * kThreads; at < vectors; at += kThreads) {
        write(at, sum_at(at), __ldg(weight + at));
    }
}

}  // namespace

void rms_norm_cuda(const RmsNormArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const bool adds = arguments.addend != nullptr;
    const auto kernel = arguments.to.scales == nullptr
                            ? (adds ? rms_norm_kernel<true, false> : rms_norm_kernel<false, false>)
                            : (adds ? rms_norm_kernel<true, true> : rms_norm_kernel<false, true>);
    launch_overlapping(kernel, {dim3(arguments.rows), dim3(kThreads)}, reinterpret_cast<cudaStream_t>(stream),
                       "rms_norm", arguments);
}

}  // namespace llama_te
