// FP8 of many rows on the GPU. A block takes a row.

#include "quantize_rows.h"

#include "elementwise/quantize.cuh"
#include "include/launch.cuh"

namespace llama_te {

namespace {

// A thread holds this many vectors of its row in registers, enough for 16,384 features. It reads the rest twice.
constexpr int kThreads = 512;
constexpr int kHeld = 4;

__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const __grid_constant__ QuantizeRowsArguments a) {
    // The next kernel starts only after this wait, so it finds everything before this kernel in memory.
    wait_for_previous_kernel();
    allow_next_kernel();
    const int vectors = a.features / kPackedElements;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * vectors;
    const uint4 *input = reinterpret_cast<const uint4 *>(a.input) + start;
    uint2 *output = reinterpret_cast<uint2 *>(a.output) + start;

    uint4 held[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at < vectors) {
            held[i] = __ldcg(input + at);
        }
    }
    float own = 0.0F;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        own = fmaxf(own, greatest_of(held[i]));
    }
    for (int at = threadIdx.x + kHeld * kThreads; at < vectors; at += kThreads) {
        own = fmaxf(own, greatest_of(__ldcg(input + at)));
    }
    const float inverse = store_scale(greatest_of_block<kThreads>(own), a.to, blockIdx.x);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at < vectors) {
            output[at] = quantized(held[i], inverse);
        }
    }
    for (int at = threadIdx.x + kHeld * kThreads; at < vectors; at += kThreads) {
        output[at] = quantized(__ldcg(input + at), inverse);
    }
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    launch_overlapping(quantize_rows_kernel, {dim3(arguments.rows), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "quantize_rows", arguments);
}

}  // namespace llama_te
