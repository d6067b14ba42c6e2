// One decoding step's attention on the GPU: rotation, append to the cache and attention over it, in one launch.
//
// A work item is one split of a row's keys (heuristics.h) for one key/value head. The grid fills the GPU, and a block
// takes every gridDim-th item, which it finds in the rows' lengths (scheduler.cuh). Items of neighbouring heads go to
// neighbouring blocks, which then read neighbouring memory at about the same time.
//
// The warps of a block work independently between the start and the end of an item. A warp takes every fourth tile of 16
// keys, loads its tiles by TMA into its own ring of stages, so that at least one copy is always on its way
// (producer.cuh), and has its own online softmax (mainloop.cuh). Then the block combines its warps' results. If the row
// has more splits, they go to the workspace, and the block that reaches the semaphore of a row's head last combines the
// splits in their order (epilogue.cuh).
//
// Shapes: B rows, K key/value heads, G query heads of each, D size of a head, P positions.

#include "decode_attention.h"

#include "epilogue.cuh"
#include "mainloop.cuh"
#include "producer.cuh"
#include "scheduler.cuh"
#include "shared_storage.cuh"

namespace llama_te {

namespace attention {

template <ElementType kElement, int kHeadDim, int kHeadTiles, bool kFp8>
__global__ void __launch_bounds__(kThreads, SharedStorage<kHeadDim, kHeadTiles, kFp8>::kBlocks)
    decode_attention_kernel(const __grid_constant__ Params params) {
    using Shared = SharedStorage<kHeadDim, kHeadTiles, kFp8>;
    extern __shared__ __align__(kStageAlignment) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Arguments &a = params.a;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const float scale = a.scale * kLog2E * (kFp8 ? kFactorOfSum : 1.0F);
    allow_next_kernel();  // if the next kernel need not wait itself, it finds room at once

    if (lane == 0) {
        for (int stage = 0; stage < Shared::kStages; ++stage) {
            init_barrier(shared_address(&shared.full[warp][stage]), 1 + Shared::kScaleVectors);
        }
        fence_barrier_init();
    }

    // Columns of fragments without a query head count nowhere, but must not hold whatever lay here.
#pragma unroll 1
    for (int i = threadIdx.x; i < kColumns * kHeadTiles * Shared::kHeadVectors; i += kThreads) {
        const int head = i / Shared::kHeadVectors;
        if (head >= a.group) {
            const int vector_bytes = i % Shared::kHeadVectors * kVectorBytes;
            *reinterpret_cast<uint4 *>(shared.heads[head] + vector_bytes) = make_uint4(0, 0, 0, 0);
        }
    }

    schedule(a, shared);
    Ring<Shared> ring(shared, warp);
    for (int i = blockIdx.x; i < shared.end_splits[kMaxDecodeRows - 1] * a.kv_heads; i += gridDim.x) {
        const int split = i / a.kv_heads;
        find_split(shared, split);
        fence_before_tma();
        __syncthreads();  // `split` is written, and no thread reads the stages any more
        const WorkItem item(a, shared.split, i - split * a.kv_heads);

        const int first_tile = item.first_tile + warp;
        Producer<Shared> producer(params, item, ring, first_tile);
#pragma unroll 1
        for (int i = 0; i < Shared::kStages; ++i) {
            producer.load(first_tile + i * kWarps, (ring.state.stage + i) % Shared::kStages);
        }

        // The previous kernel on the stream may run until here: nothing that it writes has been read, and nothing has
        // been written. The kernel has read `start`, the page table and the keys and values of earlier tokens, which
        // belong to an earlier step, and that step has ended (see ops/decode_attention.py). From the second item on this
        // wait ends at once.
        wait_for_previous_kernel();

        append_new_token<kElement>(a, item, shared);
        __syncthreads();
        unsigned query[kHeadTiles][Shared::kSteps][2];
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                load_query<kFp8>(shared.heads[t * kColumns + lane / 4], step, query[t][step]);
            }
        }

        Softmax<kElement, kHeadDim, kHeadTiles, kFp8> softmax;
        for (int tile = first_tile; tile < item.end_tile; tile += kWarps) {
            wait(ring.barrier(ring.state.stage), ring.state.phase);
            const int keys = item.start + 1 - tile * kTileKeys;
            std::uint8_t *const scales = shared.scales_of(warp, ring.state.stage);
            if (keys <= kTileKeys) {
                char *const stage = shared.stages[warp] + ring.state.stage * Shared::kStageBytes;
                if constexpr (kFp8) {
                    insert_new_fp8_token<kHeadDim>(a, item, shared, stage, scales, keys - 1);
                } else {
                    insert_new_token<kHeadDim>(shared, stage, keys - 1);
                }
            }
            softmax.add_tile(ring.at(ring.state.stage), scales, keys, scale, query);
            __syncwarp();
            producer.load(tile + Shared::kStages * kWarps, ring.state.stage);
            ring.advance();
        }
        softmax.store(shared, producer.valid && item.start >= 0);
        __syncthreads();
        epilogue<kElement, kHeadDim>(a, item, shared);
    }
}

// The tensor map of keys or values: one copy is a tile, 16 places of one head.
template <int kHeadDim, bool kFp8>
CUtensorMap cache_map(const CacheMemory &cache, const Arguments &a) {
    using T = Tile<kHeadDim, kFp8>;
    const cuuint64_t sizes[] = {T::kBoxVectors * kVectorElements, static_cast<cuuint64_t>(a.index.block_places),
                                T::kBoxes, static_cast<cuuint64_t>(a.kv_heads),
                                static_cast<cuuint64_t>(a.index.blocks)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(cache.place_stride), T::kRowBytes,
                                  static_cast<cuuint64_t>(cache.head_stride),
                                  static_cast<cuuint64_t>(cache.block_stride)};
    const cuuint32_t box[] = {T::kBoxVectors * kVectorElements, kTileKeys, T::kBoxes, 1, 1};
    constexpr CUtensorMapSwizzle kSwizzle = !T::kIsSwizzled       ? CU_TENSOR_MAP_SWIZZLE_NONE
                                            : T::kBoxVectors == 8 ? CU_TENSOR_MAP_SWIZZLE_128B
                                            : T::kBoxVectors == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
    // TMA only copies, so any type of 2 bytes does.
    return make_tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, cache.data, sizes, strides, box, kSwizzle);
}

template <ElementType kElement, int kHeadDim, int kHeadTiles, bool kFp8>
void launch(const Arguments &a, int device, cudaStream_t stream) {
    const auto kernel = decode_attention_kernel<kElement, kHeadDim, kHeadTiles, kFp8>;
    using Shared = SharedStorage<kHeadDim, kHeadTiles, kFp8>;
    constexpr int kSharedBytes = sizeof(Shared);
    // An H200's multiprocessor has 228 KB, of which each block takes 1 KB for the system.
    static_assert(Shared::kBlocks * (kSharedBytes + 1024) <= 228 * 1024);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "decode_attention");
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, kSharedBytes),
               "decode_attention");
    blocks *= multiprocessors(device);
    const int items = a.rows * a.kv_heads * max_splits(a.index.capacity);

    const dim3 grid(items < blocks ? items : blocks);
    const Params params = {a, cache_map<kHeadDim, kFp8>(a.key, a), cache_map<kHeadDim, kFp8>(a.value, a)};
    launch_overlapping(kernel, {grid, dim3(kThreads), kSharedBytes}, stream, "decode_attention", params);
}

}  // namespace attention

void decode_attention_cuda(const DecodeAttentionArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    const auto launch = [&](auto element, auto head_dim, auto is_fp8) {
        if (arguments.group <= attention::kColumns) {
            attention::launch<element.value, head_dim.value, 1, is_fp8.value>(arguments, device, cuda_stream);
        } else {
            attention::launch<element.value, head_dim.value, 2, is_fp8.value>(arguments, device, cuda_stream);
        }
    };
    dispatch("decode_attention", DecodeHeadDims{}, arguments.head_dim, [&](auto head_dim) {
        if (arguments.is_fp8()) {
            launch(std::integral_constant<ElementType, ElementType::kBFloat16>{}, head_dim, std::true_type{});
            return;
        }
        dispatch("decode_attention", DecodeElements{}, arguments.element,
                 [&](auto element) { launch(element, head_dim, std::false_type{}); });
    });
}

}  // namespace llama_te
