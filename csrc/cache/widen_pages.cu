// Pages of an FP8 cache as bfloat16, on the GPU.
//
// A thread turns 8 bytes of a head into a vector of 16, so that a warp's stores have no gaps: most bytes are written. Blocks
// take chunks of pages, some vectors for each thread, whose loads are all in flight before the first is used. The host does
// not know the rows' lengths, so a fixed number of blocks shares the chunks of the pages that rows use, and passes over the
// others row by row.

#include "widen_pages.h"

#include <cuda_fp8.h>

#include "include/e4m3.cuh"
#include "include/e4m3.h"
#include "include/launch.cuh"
#include "include/vector.cuh"

namespace llama_te {

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // of a thread, of the target
constexpr int kChunk = kThreads * kVectors;
constexpr int kBlocksOfMultiprocessor = 8;

__device__ unsigned widen_pair(unsigned pair, float factor) {
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
    const float2 values = __half22float2(__half2(raw));
    return Pair<ElementType::kBFloat16>::pack(values.x * factor, values.y * factor);
}

__device__ uint4 widen_eight(uint2 eight, float factor) {
    return make_uint4(widen_pair(eight.x & 0xffffU, factor), widen_pair(eight.x >> 16, factor),
                      widen_pair(eight.y & 0xffffU, factor), widen_pair(eight.y >> 16, factor));
}

__device__ void widen_chunk(const WidenPagesArguments &a, std::int32_t block, int first_vector, int page_vectors,
                            uint4 *page) {
    const int head_vectors = a.head_dim / kPackedElements;
    uint2 held[kVectors];
    unsigned scales[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int vector = first_vector + i * kThreads;
        if (vector < page_vectors) {
            const int head = vector / head_vectors;  // of the page
            const int place = head / a.kv_heads;
            const int kv_head = head - place * a.kv_heads;
            const char *const from = a.source.at(block, place) + kv_head * a.source.head_stride +
                                     (vector - head * head_vectors) * kPackedElements;
            held[i] = __ldcs(reinterpret_cast<const uint2 *>(from));
            scales[i] = __ldg(a.scale.at(block, kv_head, place));
        }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int vector = first_vector + i * kThreads;
        if (vector < page_vectors) {
            page[vector] = widen_eight(held[i], __uint_as_float(bits_of_scale(scales[i])));
        }
    }
}

__global__ void __launch_bounds__(kThreads) widen_pages_kernel(const __grid_constant__ WidenPagesArguments a) {
    // The next kernel starts only after this wait, so it finds everything before this kernel in memory.
    wait_for_previous_kernel();
    allow_next_kernel();
    const int page_vectors = static_cast<int>(a.page_elements() / kPackedElements);
    const int page_chunks = divide_up(page_vectors, kChunk);
    const std::int64_t row_chunks = static_cast<std::int64_t>(a.pages_per_row) * page_chunks;
    // Chunks are numbered row after row.
    std::int64_t chunk = blockIdx.x;
    for (int row = 0; row < a.rows; ++row) {
        const std::int64_t first = row * row_chunks;
        const std::int64_t end = first + static_cast<std::int64_t>(a.pages_of(a.length[row])) * page_chunks;
        for (; chunk < end; chunk += gridDim.x) {
            const std::int64_t page = (chunk - first) / page_chunks;
            const int first_vector = static_cast<int>(chunk - first - page * page_chunks) * kChunk;
            const std::int32_t block = *a.index.table_entry(row, static_cast<std::int32_t>(page));
            if (block >= 0 && block < a.index.blocks) {
                char *const to = a.target + (row * static_cast<std::int64_t>(a.pages_per_row) + page) *
                                                a.page_elements() * element_bytes(ElementType::kBFloat16);
                widen_chunk(a, block, first_vector + static_cast<int>(threadIdx.x), page_vectors,
                            reinterpret_cast<uint4 *>(to));
            }
        }
        // The block's first chunk of the next row: as many of this row are passed over as keep the blocks' shares even.
        const std::int64_t rest = first + row_chunks - chunk;
        chunk += rest > 0 ? divide_up<std::int64_t>(rest, gridDim.x) * gridDim.x : 0;
    }
}

}  // namespace

void widen_pages_cuda(const WidenPagesArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const std::int64_t page_vectors = arguments.page_elements() / kPackedElements;
    if (page_vectors > 0x7fffffff - kChunk) {  // the kernel counts a page's vectors in 32 bits
        throw std::invalid_argument("source has pages of " + std::to_string(arguments.page_elements()) +
                                    " bytes, too many");
    }
    const std::int64_t chunks =
        divide_up<std::int64_t>(page_vectors, kChunk) * arguments.rows * arguments.pages_per_row;
    const std::int64_t most = static_cast<std::int64_t>(multiprocessors(device)) * kBlocksOfMultiprocessor;
    const dim3 grid(static_cast<unsigned>(chunks < most ? chunks : most));
    launch_overlapping(widen_pages_kernel, {grid, dim3(kThreads)}, reinterpret_cast<cudaStream_t>(stream),
                       "widen_pages", arguments);
}

}  // namespace llama_te
