// y = x W^T for a few rows x, bound by how fast W streams from memory, with the operations around it in a layer fused:
// RMSNorm of x before it, and SwiGLU or the residual's addition after it. Products that follow each other are one launch.
//
// The kernel is persistent and warp-specialized. A block works on tiles of 16 to 128 rows of W. One producer thread
// fills a ring of stages with W by TMA; a stage has 128 bytes of columns of W for each of the warps that share them, and
// x for these columns, which a second producer thread adds (producer.cuh). The math warps multiply, each its own columns
// (mainloop.cuh). The epilogue adds their sums up in a fixed order (epilogue.cuh). heuristics.h chooses the size of
// tiles and the number of blocks that share the columns of a tile.
//
// W does not depend on earlier kernels. So its producer goes on to the next tile and to the next product while earlier
// ones are still computed, and starts before the previous kernel has ended (programmatic dependent launch). Memory stays
// busy while one product waits for another: x may be read once all tiles of the previous product are counted as finished.

#include "linear.h"

#include <algorithm>

#include "config.cuh"
#include "epilogue.cuh"
#include "heuristics.h"
#include "mainloop.cuh"
#include "producer.cuh"

namespace llama_te {

namespace gemv {

template <WeightType kWeight, int kRowGroups>
__global__ void __launch_bounds__(KernelConfig<kWeight, kRowGroups>::kThreads, 1)
    linear_kernel(const __grid_constant__ Params params, const int stages, const int stage_bytes) {
    using Config = KernelConfig<kWeight, kRowGroups>;
    static_assert(sizeof(SharedHeader) <= Config::kHeaderBytes);
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    SharedHeader &header = *reinterpret_cast<SharedHeader *>(shared);
    char *const tail = shared + Config::kHeaderBytes + stages * stage_bytes;
    const Block block = {params,
                         header,
                         shared_address(shared) + Config::kHeaderBytes,
                         reinterpret_cast<float4 *>(tail),
                         reinterpret_cast<float *>(tail + Config::kSumBytes),
                         stages,
                         stage_bytes,
                         params.products[0].a.rows};

    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            init_barrier(shared_address(header.issued + i), 1);
            init_barrier(shared_address(header.full + i), 2);
            init_barrier(shared_address(header.empty + i), Config::kMathWarps);
        }
        init_barrier(shared_address(header.item_started), 1);
        init_barrier(shared_address(header.item_started + 1), 1);
        init_barrier(shared_address(&header.sums_full), Config::kMathWarps);
        init_barrier(shared_address(&header.sums_empty), Config::kEpilogueWarps);
        fence_barrier_init();
    }
    __syncthreads();

    if (warp == Config::kWeightProducerWarp) {
        if (lane == 0) {
            produce_weights<Config>(block);
        }
    } else if (warp == Config::kInputProducerWarp) {
        if (lane == 0) {
            produce_inputs<Config>(block);
        }
    } else if (warp < Config::kMathWarps) {
        if constexpr (!Config::kOwnEpilogueWarps) {
            wait_for_previous_kernel();
        }
        PipelineState state;
        int squares_of = kNone;  // the product whose factors of RMSNorm are known
        for (unsigned phase = 0;; phase ^= 1) {
            wait(block.full(state), state.phase);
            const int number = header.product[state.stage];
            const bool new_squares = number != kNone && params.products[number].a.norm_weight != nullptr &&
                                     (params.products[number].splits > 1 || squares_of != number);
            if (threadIdx.x == 0) {
                header.epilogue_product[phase] = number;
                header.epilogue_item[phase] = header.item[state.stage];
                header.new_squares[phase] = new_squares;
                arrive(shared_address(header.item_started + phase));
            }
            if (number == kNone) {
                break;
            }
            squares_of = new_squares ? number : squares_of;
            const ProductParams &product = params.products[number];
            const int item = header.item[state.stage];
            dispatch_tile<Config>(product.tile, [&](auto tile) {
                mainloop<decltype(tile)>(block, product, new_squares, phase, state);
            });
            if constexpr (!Config::kOwnEpilogueWarps) {
                epilogue<Config>(block, product, item, number < params.count - 1, phase);
            }
        }
    } else {
        wait_for_previous_kernel();
        for (unsigned items = 0;; ++items) {
            const unsigned phase = items % 2;
            wait(shared_address(header.item_started + phase), items / 2 % 2);
            const int number = header.epilogue_product[phase];
            if (number == kNone) {
                break;
            }
            const ProductParams &product = params.products[number];
            epilogue<Config>(block, product, header.epilogue_item[phase], number < params.count - 1, phase);
        }
    }
}

// The tensor map of a matrix [rows, columns], cut into boxes of 128 bytes of columns of `box_rows` rows. One copy takes
// `boxes` of them, which lie one behind the other in shared memory.
CUtensorMap matrix_map(const char *data, int rows, int columns, bool wide, int box_rows, int boxes) {
    const int box_columns = kBoxBytes / (wide ? 2 : 1);
    const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * (wide ? 2 : 1);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(box_columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(columns / box_columns)};
    const cuuint64_t strides[] = {row_bytes, kBoxBytes};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                              static_cast<cuuint32_t>(boxes)};
    return make_tensor_map(wide ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, data, sizes,
                           strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
}

template <WeightType kWeight, int kRowGroups>
void launch(const std::vector<Product> &products, int device, cudaStream_t stream) {
    using Config = KernelConfig<kWeight, kRowGroups>;
    const int blocks = multiprocessors(device);
    Params params = {};
    params.count = static_cast<int>(products.size());
    std::int32_t *const counters = products[0].semaphores + blocks;
    params.exits = counters + 2 * kMaxProducts;
    int most_items = 0;
    int stage_bytes = 0;
    for (int i = 0; i < params.count; ++i) {
        const Product &a = products[i];
        const auto [tile, splits] = choose_tile<Config>(a, blocks);
        const int tile_rows = tile * kMmaRows;
        const int boxes = Config::boxes_of(tile);
        const int tiles = divide_up(a.out_features, tile_rows);
        params.products[i] = {matrix_map(a.weight, a.out_features, a.in_features, Config::kWide,
                                         a.swiglu ? tile_rows / 2 : tile_rows, boxes),
                              matrix_map(a.input, a.rows, a.in_features, true, a.rows, boxes * Config::kInputBoxes),
                              a,
                              tile,
                              tiles,
                              splits,
                              counters + i,
                              counters + kMaxProducts + i};
        most_items = std::max(most_items, tiles * splits);
        stage_bytes = std::max(stage_bytes, Config::kWeightBytes + (a.rows + 1) * boxes * Config::kBoxColumns * 2);
    }
    stage_bytes = round_up(stage_bytes, 1024);
    const int stages = std::min((Config::kSharedBytes - Config::kHeaderBytes - Config::kTailBytes) / stage_bytes,
                                Config::kMaxStages);

    const auto kernel = linear_kernel<kWeight, kRowGroups>;
    static std::atomic<bool> allowed[64];
    if (!allowed[device].load(std::memory_order_relaxed)) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes),
                   "cudaFuncSetAttribute");
        allowed[device].store(true, std::memory_order_relaxed);
    }
    const int shared_bytes = Config::kHeaderBytes + stages * stage_bytes + Config::kTailBytes;
    // Not a cooperative launch, although blocks of a chain wait for each other: a cooperative launch could not start
    // before the previous kernel has ended. There are no more blocks than multiprocessors, and other kernels end by
    // themselves, except another such launch on another stream: the caller keeps those apart.
    launch_overlapping(kernel, {dim3(std::min(most_items, blocks)), dim3(Config::kThreads), shared_bytes}, stream,
                       "linear", params, stages, stage_bytes);
}

template <WeightType kWeight>
void choose_row_groups(const std::vector<Product> &products, int device, cudaStream_t stream) {
    const int rows = products[0].rows;
    if (rows <= 8) {
        return launch<kWeight, 1>(products, device, stream);
    }
    if (rows <= 16) {
        return launch<kWeight, 2>(products, device, stream);
    }
    return launch<kWeight, 4>(products, device, stream);
}

}  // namespace gemv

std::int64_t linear_partials(int device) {
    // One split of a tile of the largest kind for each block.
    return static_cast<std::int64_t>(multiprocessors(device)) * (kMaxLinearRows * 128 + kMaxLinearRows);
}

std::int64_t linear_semaphores(int device) {
    // One for each tile that is split, and the counters of the products and of the blocks' exits.
    return multiprocessors(device) + 2 * kMaxProducts + 1;
}

void linear_cuda(const std::vector<Product> &products, int device, std::uintptr_t stream) {
    if (products.empty() || products.size() > kMaxProducts) {
        throw std::invalid_argument("linear takes 1 to " + std::to_string(kMaxProducts) + " products, not " +
                                    std::to_string(products.size()));
    }
    const DeviceGuard guard(device);
    dispatch("linear", WeightTypes{}, products[0].weight_type, [&](auto weight) {
        gemv::choose_row_groups<weight.value>(products, device, reinterpret_cast<cudaStream_t>(stream));
    });
}

}  // namespace llama_te
