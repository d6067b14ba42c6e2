// Greedy sampling on the GPU. Several blocks share a row, and the last of them stores its token.

#include "greedy.h"

#include "include/integer.h"
#include "include/launch.cuh"
#include "include/warp.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 128;
constexpr int kVectorElements = 8;

__global__ void __launch_bounds__(kThreads) greedy_kernel(const __grid_constant__ GreedyArguments a) {
    allow_next_kernel();
    wait_for_previous_kernel();
    const int row = blockIdx.y;
    const char *logits = a.logits + row * a.row_stride;
    Rank best = 0;
    const int step = gridDim.x * kThreads * kVectorElements;
    for (int first = (blockIdx.x * kThreads + threadIdx.x) * kVectorElements; first < a.vocabulary; first += step) {
        const uint4 vector = __ldcg(reinterpret_cast<const uint4 *>(logits + first * 2LL));
        const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            best = max(best, rank_of(__uint_as_float(words[i] << 16), first + 2 * i));
            best = max(best, rank_of(__uint_as_float(words[i] & 0xffff0000U), first + 2 * i + 1));
        }
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        best = max(best, __shfl_xor_sync(kWholeWarp, best, distance));
    }
    __shared__ Rank best_of_warp[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) {
        best_of_warp[threadIdx.x / kWarp] = best;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < kThreads / kWarp; ++i) {
            best = max(best, best_of_warp[i]);
        }
        atomicMax(reinterpret_cast<unsigned long long *>(a.best + row), static_cast<unsigned long long>(best));
        __threadfence();
        if (atomicAdd(a.semaphores + row, 1) == static_cast<int>(gridDim.x) - 1) {
            __threadfence();
            best = atomicExch(reinterpret_cast<unsigned long long *>(a.best + row), 0ULL);
            a.semaphores[row] = 0;  // for the next launch
            a.tokens[row] = token_of(best);
            if (a.lengths != nullptr && a.lengths[row] > 0) {
                a.lengths[row] += 1;
            }
        }
    }
}

}  // namespace

void greedy_cuda(const GreedyArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    // One vector to a thread, unless fewer blocks already keep the GPU busy.
    const int needed = divide_up(arguments.vocabulary, kVectorElements * kThreads);
    const int useful = multiprocessors(device) * 4 / arguments.rows + 1;
    const auto blocks = static_cast<unsigned>(needed < useful ? needed : useful);
    launch_overlapping(greedy_kernel, {dim3(blocks, arguments.rows), dim3(kThreads)},
                       reinterpret_cast<cudaStream_t>(stream), "greedy", arguments);
}

}  // namespace llama_te
