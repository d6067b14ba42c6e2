// Greedy sampling on the GPU. Several blocks share a row, and the last of them stores its token.

#include "greedy.h"

#include "include/integer.h"
#include "include/launch.cuh"
#include "include/warp.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 128;
constexpr int kVectorElements = 8;

// Maps a logit (its float32 bits) and its token to an integer, so that the greatest integer belongs to the greatest logit
// and, of equal ones, to the lowest token. NaN is above all numbers.
__device__ std::uint64_t rank(unsigned bits, unsigned token) {
    const float value = __uint_as_float(bits) + 0.0F;  // turns -0 into 0
    bits = __float_as_uint(value);
    const unsigned ordered = bits & 0x80000000U ? ~bits : bits | 0x80000000U;
    return static_cast<std::uint64_t>(value == value ? ordered : 0xffffffffU) << 32 | (0xffffffffU - token);
}

// The token of a row's greatest rank, unless the logit is NaN or infinite.
__device__ std::int64_t token_of(std::uint64_t rank) {
    const auto ordered = static_cast<unsigned>(rank >> 32);
    const bool is_finite = ordered >= 0x00800000U && ordered < 0xff800000U;  // from the lowest to the greatest float32
    return is_finite ? 0xffffffffU - static_cast<unsigned>(rank) : kNoToken;
}

__global__ void __launch_bounds__(kThreads) greedy_kernel(const __grid_constant__ GreedyArguments a) {
    allow_next_kernel();
    wait_for_previous_kernel();
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
    __shared__ std::uint64_t best_of_warp[kThreads / kWarp];
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
