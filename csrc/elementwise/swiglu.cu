// SwiGLU of many rows on the GPU. A block takes a part of a row, or a whole row that is rounded to FP8.

#include "swiglu.h"

#include "elementwise/quantize.cuh"
#include "include/integer.h"
#include "include/launch.cuh"
#include "include/vector.cuh"

namespace llama_te {

namespace {

using Packed = Vector<ElementType::kBFloat16>;
constexpr int kVectorElements = Packed::kElements;
constexpr int kThreads = 128;
constexpr int kVectors = 2;  // of each half, of a thread

// A block of `swiglu_quantized_kernel` holds so many vectors of its row, 16,384 features. It computes the rest twice.
constexpr int kRowThreads = 512;
constexpr int kHeld = 4;

__device__ float input_scale_of(const SwigluArguments &a) {
    return a.input_scale == nullptr ? 1.0F : __ldcg(a.input_scale + blockIdx.x);
}

__device__ uint4 activated(const uint4 &gate, const uint4 &up, float scale) {
    float values[kVectorElements];
    float factors[kVectorElements];
    Packed::unpack(gate, values);
    Packed::unpack(up, factors);
#pragma unroll
    for (int j = 0; j < kVectorElements; ++j) {
        const float x = values[j] * scale;
        values[j] = __fdividef(x, 1.0F + __expf(-x)) * (factors[j] * scale);
    }
    return Packed::pack(values);
}

__global__ void __launch_bounds__(kThreads) swiglu_kernel(const __grid_constant__ SwigluArguments a) {
    // The next kernel starts only after this wait, so it finds everything before this kernel in memory.
    wait_for_previous_kernel();
    allow_next_kernel();
    const int vectors = a.features / kVectorElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    const uint4 *gate = reinterpret_cast<const uint4 *>(a.input) + 2 * start;
    const uint4 *up = gate + vectors;
    uint4 *output = reinterpret_cast<uint4 *>(a.output) + start;
    const int first = blockIdx.y * kThreads * kVectors + threadIdx.x;
    const float scale = input_scale_of(a);

    uint4 gates[kVectors];
    uint4 ups[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = first + i * kThreads;
        if (at < vectors) {
            gates[i] = __ldcg(gate + at);
            ups[i] = __ldcg(up + at);
        }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int at = first + i * kThreads;
        if (at < vectors) {
            output[at] = activated(gates[i], ups[i], scale);
        }
    }
}

__global__ void __launch_bounds__(kRowThreads) swiglu_quantized_kernel(const __grid_constant__ SwigluArguments a) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int vectors = a.features / kVectorElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    const uint4 *gate = reinterpret_cast<const uint4 *>(a.input) + 2 * start;
    const uint4 *up = gate + vectors;
    uint2 *output = reinterpret_cast<uint2 *>(a.output) + start;
    const float scale = input_scale_of(a);

    uint4 gates[kHeld] = {};
    uint4 ups[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kRowThreads;
        if (at < vectors) {
            gates[i] = __ldcg(gate + at);
            ups[i] = __ldcg(up + at);
        }
    }
    const auto activated_at = [&](int at) { return activated(__ldcg(gate + at), __ldcg(up + at), scale); };
    uint4 held[kHeld];
    float greatest = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        held[i] = activated(gates[i], ups[i], scale);
        greatest = fmaxf(greatest, greatest_of(held[i]));
    }
    for (int at = threadIdx.x + kHeld * kRowThreads; at < vectors; at += kRowThreads) {
        greatest = fmaxf(greatest, greatest_of(activated_at(at)));
    }
    const float inverse = store_scale(greatest_of_block<kRowThreads>(greatest), a.to, blockIdx.x);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kRowThreads;
        if (at < vectors) {
            output[at] = quantized(held[i], inverse);
        }
    }
    for (int at = threadIdx.x + kHeld * kRowThreads; at < vectors; at += kRowThreads) {
        output[at] = quantized(activated_at(at), inverse);
    }
}

}  // namespace

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    if (arguments.to.scales != nullptr) {
        launch_overlapping(swiglu_quantized_kernel, {dim3(arguments.rows), dim3(kRowThreads)},
                           reinterpret_cast<cudaStream_t>(stream), "swiglu", arguments);
        return;
    }
    constexpr int kElements = kThreads * kVectors * kVectorElements;
    const auto blocks = static_cast<unsigned>(divide_up(arguments.features, kElements));
    launch_overlapping(swiglu_kernel, {dim3(arguments.rows, blocks), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "swiglu", arguments);
}

}  // namespace llama_te
