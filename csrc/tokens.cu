// The two ends of a decoding step, on the GPU.

#include "launch.cuh"
#include "tokens.h"
#include "warp.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 128;
constexpr int kVectorElements = 8;

__global__ void __launch_bounds__(kThreads) embed_kernel(const __grid_constant__ EmbedArguments a) {
    // In this order: once this kernel has begun, all that came before the step is done, so that the kernels behind it may
    // read the cache and the lengths ahead of their own wait.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    const std::int64_t token = __ldcg(a.tokens + blockIdx.y);
    const bool known = token >= 0 && token < a.vocabulary;
    const std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16;
    if (at < a.row_bytes) {
        uint4 vector = make_uint4(0, 0, 0, 0);
        if (known) {
            vector = __ldg(reinterpret_cast<const uint4 *>(a.table + token * a.row_bytes + at));
        }
        *reinterpret_cast<uint4 *>(a.output + blockIdx.y * a.row_bytes + at) = vector;
    }
}

// Numbers in the order of the logits and, of equal ones, in the reverse order of the tokens. Never 0 for a number; NaN
// is below all.
__device__ std::uint64_t rank(unsigned bits, unsigned token) {
    const float value = __uint_as_float(bits) + 0.0F;  // which makes one zero of the two
    bits = __float_as_uint(value);
    const unsigned ordered = bits & 0x80000000U ? ~bits : bits | 0x80000000U;
    return value == value ? static_cast<std::uint64_t>(ordered) << 32 | (0xffffffffU - token) : 0xffffffffU - token;
}

__global__ void __launch_bounds__(kThreads) greedy_kernel(const __grid_constant__ GreedyArguments a) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int row = blockIdx.y;
    const char *logits = a.logits + row * a.row_stride;
    std::uint64_t best = 0;
    const int step = gridDim.x * kThreads * kVectorElements;
    for (int first = (blockIdx.x * kThreads + threadIdx.x) * kVectorElements; first < a.vocabulary; first += step) {
        const uint4 vector = __ldcg(reinterpret_cast<const uint4 *>(logits + first * 2LL));
        const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            best = max(best, rank(words[i] << 16, first + 2 * i));
            best = max(best, rank(words[i] & 0xffff0000U, first + 2 * i + 1));
        }
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        best = max(best, __shfl_xor_sync(kWholeWarp, best, distance));
    }
    __shared__ std::uint64_t of_warps[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
        of_warps[threadIdx.x / kWarp] = best;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < kThreads / kWarp; ++i) {
            best = max(best, of_warps[i]);
        }
        atomicMax(reinterpret_cast<unsigned long long *>(a.best + row), static_cast<unsigned long long>(best));
        __threadfence();
        if (atomicAdd(a.tickets + row, 1) == static_cast<int>(gridDim.x) - 1) {
            __threadfence();
            best = atomicExch(reinterpret_cast<unsigned long long *>(a.best + row), 0ULL);
            a.tickets[row] = 0;  // for the next launch
            a.tokens[row] = 0xffffffffU - static_cast<unsigned>(best);
            if (a.lengths != nullptr && a.lengths[row] > 0) {
                a.lengths[row] += 1;
            }
        }
    }
}

}  // namespace

void embed_cuda(const EmbedArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto blocks = static_cast<unsigned>((arguments.row_bytes / 16 + kThreads - 1) / kThreads);
    launch_overlapping(embed_kernel, {dim3(blocks, arguments.rows), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "embed", arguments);
}

void greedy_cuda(const GreedyArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    // Blocks for a vector of each thread, or as many as keep the GPU busy.
    const int needed = (arguments.vocabulary / kVectorElements + kThreads - 1) / kThreads;
    const int useful = multiprocessors(device) * 4 / arguments.rows + 1;
    const auto blocks = static_cast<unsigned>(needed < useful ? needed : useful);
    launch_overlapping(greedy_kernel, {dim3(blocks, arguments.rows), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "greedy", arguments);
}

}  // namespace llama_te
