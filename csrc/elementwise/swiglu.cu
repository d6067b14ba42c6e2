// SwiGLU of many rows on the GPU. A block takes a part of a row.

#include "swiglu.h"

#include "include/integer.h"
#include "include/launch.cuh"
#include "include/vector.cuh"

namespace llama_te {

namespace {

using Packed = Vector<ElementType::kBFloat16>;
constexpr int kVectorElements = Packed::kElements;
constexpr int kThreads = 128;
constexpr int kVectors = 2;  // of each half, of a thread

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

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    constexpr int kElements = kThreads * kVectors * kVectorElements;
    const auto blocks = static_cast<unsigned>(divide_up(arguments.features, kElements));
    launch_overlapping(swiglu_kernel, {dim3(arguments.rows, blocks), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "swiglu", arguments);
}

}  // namespace llama_te
