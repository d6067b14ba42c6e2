// Beam reordering on the GPU: rows exchange their contents in place, in all caches, in one launch.
//
// A thread owns one column of bytes. It reads the column of every source row before it writes any row, so it needs no
// other memory and no barrier, whatever the permutation, duplicates included. It holds 256 bytes in 64 registers: 4, 2 or
// 1 columns of 16 bytes for up to 4, 8 or 16 rows, one column of 8 bytes for 32 rows and one of 4 bytes for 64.

#include "reorder.h"

#include "include/launch.cuh"
#include "include/warp.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 128;
constexpr int kHeldBytes = 256;

static_assert(sizeof(ReorderArguments) <= 4096, "a kernel's parameters have at most 4 KiB");

struct Moves {
    Move moves[kMaxReorderRows];
    int count;
    std::int64_t most_bytes;
};

// Collects the moves of all rows in shared memory. The first warp looks at 32 rows at a time. Ends with a barrier.
template <typename Find>
__device__ void collect(const ReorderArguments &a, Moves &shared, Find find) {
    if (threadIdx.x < kWarp) {
        int count = 0;
        std::int64_t most = 0;
        for (int first = 0; first < a.rows; first += kWarp) {
            const int row = first + threadIdx.x;
            Move move = {};
            const bool moves = row < a.rows && find(a, row, move);
            const unsigned mask = __ballot_sync(kWholeWarp, moves);
            if (moves) {
                shared.moves[count + __popc(mask & ((1U << threadIdx.x) - 1))] = move;
                most = max(most, move.bytes);
            }
            count += __popc(mask);
        }
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            most = max(most, __shfl_xor_sync(kWholeWarp, most, distance));
        }
        if (threadIdx.x == 0) {
            shared.count = count;
            shared.most_bytes = most;
        }
    }
    __syncthreads();
}

// Keeps the compiler from loading the moves of all rows ahead: for 64 rows it ran out of registers.
__device__ void keep_order() {
    asm volatile("" ::: "memory");
}

template <typename Word, int kRows>
struct Piece {
    static constexpr int kColumns = kHeldBytes / kRows / static_cast<int>(sizeof(Word));
    static constexpr int kBytes = kThreads * kColumns * static_cast<int>(sizeof(Word));
    static_assert(kColumns >= 1);

    // Carries out all moves within the kBytes bytes from `begin`.
    static __device__ void carry_out(char *data, const Moves &shared, std::int64_t begin) {
        Word held[kRows][kColumns];
        begin += threadIdx.x * sizeof(Word);
        const int count = shared.count;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            keep_order();
            if (row < count) {
                const Move move = shared.moves[row];
#pragma unroll
                for (int column = 0; column < kColumns; ++column) {
                    const std::int64_t at = begin + column * kThreads * sizeof(Word);
                    if (at < move.bytes) {
                        held[row][column] = *reinterpret_cast<const Word *>(data + move.from + at);
                    }
                }
            }
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            keep_order();
            if (row < count) {
                const Move move = shared.moves[row];
#pragma unroll
                for (int column = 0; column < kColumns; ++column) {
                    const std::int64_t at = begin + column * kThreads * sizeof(Word);
                    if (at < move.bytes) {
                        *reinterpret_cast<Word *>(data + move.to + at) = held[row][column];
                    }
                }
            }
        }
    }
};

// The host does not know how far the rows are filled, so a fixed number of blocks shares the pieces of that length.
template <typename Word, int kRows>
__device__ void carry_out_in_caches(char *const *caches, int count, const Moves &shared) {
    using Part = Piece<Word, kRows>;
    const auto pieces = static_cast<unsigned>((shared.most_bytes + Part::kBytes - 1) / Part::kBytes);
    for (unsigned i = blockIdx.x; i < pieces * count; i += gridDim.x) {
        const unsigned cache = i / pieces;
        Part::carry_out(caches[cache], shared, static_cast<std::int64_t>(i - cache * pieces) * Part::kBytes);
    }
}

template <typename Word, int kRows>
__global__ void __launch_bounds__(kThreads) reorder_rows_kernel(const __grid_constant__ ReorderArguments a) {
    __shared__ Moves shared;
    collect(a, shared, row_move);
    carry_out_in_caches<Word, kRows>(a.caches, a.cache_count, shared);
}

// Every block needs entries of the page table from before the reorder, and one block must change the table. The block
// that reaches the semaphore last does that: all others have read their entries by then, and no block waits.
template <typename Word, int kRows>
__global__ void __launch_bounds__(kThreads) reorder_pages_kernel(const __grid_constant__ ReorderArguments a) {
    __shared__ Moves shared;
    __shared__ Moves of_scales;
    __shared__ bool last;
    collect(a, shared, page_move);
    if (a.scale_count > 0) {
        collect(a, of_scales, scale_move);
    }
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(a.semaphore, 1) == static_cast<int>(gridDim.x) - 1;
        if (last) {
            *a.semaphore = 0;  // for the next launch
            __threadfence();
        }
    }
    carry_out_in_caches<Word, kRows>(a.caches, a.cache_count, shared);
    if (a.scale_count > 0) {
        carry_out_in_caches<Word, kRows>(a.caches + a.cache_count, a.scale_count, of_scales);
    }
    __syncthreads();  // `last` is written, and no thread reads `shared` any more
    if (last) {
        collect(a, shared, table_move);
        using Part = Piece<std::int32_t, kRows>;
        for (std::int64_t begin = 0; begin < shared.most_bytes; begin += Part::kBytes) {
            Part::carry_out(reinterpret_cast<char *>(a.table_entry(0, 0)), shared, begin);
        }
    }
}

template <typename Word, int kRows>
void launch(const ReorderArguments &a, bool pages, int device, cudaStream_t stream) {
    const auto kernel = pages ? reorder_pages_kernel<Word, kRows> : reorder_rows_kernel<Word, kRows>;
    int blocks_at_once = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_at_once, kernel, kThreads, 0),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    const std::int64_t at_once = static_cast<std::int64_t>(blocks_at_once) * multiprocessors(device);
    constexpr std::int64_t kPieceBytes = Piece<Word, kRows>::kBytes;
    const std::int64_t most = divide_up(a.block_bytes, kPieceBytes) * a.cache_count;
    if (most > 0x7fffffff) {  // the kernel counts pieces in 32 bits
        throw std::invalid_argument("caches have rows of " + std::to_string(a.block_bytes) + " bytes, too many");
    }
    const auto blocks = static_cast<unsigned>(most < at_once ? most : at_once);
    kernel<<<blocks, kThreads, 0, stream>>>(a);
    check_cuda(cudaGetLastError(), pages ? "reorder_pages" : "reorder_rows");
}

void choose_rows(const ReorderArguments &a, bool pages, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (a.rows <= 4) {
        launch<uint4, 4>(a, pages, device, cuda_stream);
    } else if (a.rows <= 8) {
        launch<uint4, 8>(a, pages, device, cuda_stream);
    } else if (a.rows <= 16) {
        launch<uint4, 16>(a, pages, device, cuda_stream);
    } else if (a.rows <= 32) {
        launch<uint2, 32>(a, pages, device, cuda_stream);
    } else {
        launch<std::uint32_t, kMaxReorderRows>(a, pages, device, cuda_stream);
    }
}

}  // namespace

void reorder_rows_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream) {
    choose_rows(arguments, false, device, stream);
}

void reorder_pages_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream) {
    choose_rows(arguments, true, device, stream);
}

}  // namespace llama_te
