// Rows of the embedding for tokens, on the GPU.

#include "embed.h"

#include "include/cache.h"
#include "include/launch.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) embed_kernel(const __grid_constant__ EmbedArguments a) {
    // In this order: once the next kernel has started, everything before the step has ended, so the kernels behind this
    // one may read the cache and the lengths before their own wait.
    wait_for_previous_kernel();
    allow_next_kernel();
    const std::int64_t token = __ldcg(a.tokens + blockIdx.y);
    const bool known = token >= 0 && token < a.vocabulary;
    const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVectorBytes;
    if (at < a.row_bytes) {
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (known) {
            vector = __ldg(reinterpret_cast<const uint4 *>(a.table + token * a.row_bytes + at));
        }
        *reinterpret_cast<uint4 *>(a.output + blockIdx.y * a.row_bytes + at) = vector;
    }
}

}  // namespace

void embed_cuda(const EmbedArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto blocks = static_cast<unsigned>(divide_up<std::int64_t>(arguments.row_bytes, kVectorBytes * kThreads));
    launch_overlapping(embed_kernel, {dim3(blocks, arguments.rows), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "embed", arguments);
}

}  // namespace llama_te
