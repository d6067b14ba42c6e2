// The producers of the pipeline: one thread of each block streams W by TMA, and another one adds x.

#pragma once

#include "config.cuh"

namespace llama_te::gemv {

// --- counters in global memory, which order the products of a chain

// Waits until a counter has reached `count` on the whole GPU. Threads and TMA can then read what was written before.
__device__ inline void wait_for_count(const std::int32_t *counter, int count) {
    int counted;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(counted) : "l"(counter) : "memory");
    } while (counted < count);
    fence_global_before_tma();
}

__device__ inline void release_and_count(std::int32_t *counter) {
    fence_global_before_tma();
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// --- producers

// Streams W, stage by stage.
//
// The first two work items of a block are fixed. Multiprocessors are not equally close to the memory, so afterwards a
// block draws its next item from a counter: it asks when an item starts, and reads the answer when that item ends.
// Launches that overlap share the counters, so a block asks only after the previous kernel has ended.
template <typename Config>
__device__ void produce_weights(const Block &block) {
    const Params &params = block.params;
    SharedHeader &header = block.header;
    const int blocks = gridDim.x;
    bool waited = false;
    PipelineState state;
    for (int number = 0; number < params.count; ++number) {
        const ProductParams &product = params.products[number];
        const Product &a = product.a;
        const int items = product.items();
        const int boxes = a.in_features / Config::kBoxColumns;
        const int tile_rows = product.tile * kMmaRows;
        const int stage_boxes = Config::boxes_of(product.tile);
        const int items_to_draw = max(items - 2 * blocks, 0);
        int drawn = 0;
        int item = blockIdx.x;
        for (int turn = 0;; ++turn) {
            if (turn == 1) {
                item = blockIdx.x + blocks;
            } else if (turn > 1) {
                if (drawn == items_to_draw + blocks - 1) {
                    *product.drawn_items = 0;  // all blocks have drawn their last number: for the next launch
                }
                item = items_to_draw > 0 ? 2 * blocks + drawn : items;
            }
            if (item >= items) {
                break;
            }
            if (turn > 0 && items_to_draw > 0) {
                if (!waited) {
                    wait_for_previous_kernel();
                    waited = true;
                }
                drawn = atomicAdd(product.drawn_items, 1);
            }
            const int tile = item / product.splits;
            const int split = item - tile * product.splits;
            const int end = boxes * (split + 1) / product.splits;
            for (int box = boxes * split / product.splits; box < end; box += stage_boxes) {
                const unsigned to = block.stage(state);
                wait(block.empty(state), state.phase ^ 1);
                header.product[state.stage] = number;
                header.item[state.stage] = item;
                header.box[state.stage] = box;
                arrive(block.issued(state));
                // Boxes behind the last column count too: TMA fills them with zeros.
                arrive_and_expect(block.full(state), Config::kWeightBytes);
                if (a.swiglu) {
                    // The gate's rows, then the up projection's rows for the same features.
                    tma_load_3d(to, product.weight, tile * tile_rows / 2, box, block.full(state));
                    tma_load_3d(to + Config::kWeightBytes / 2, product.weight,
                                a.out_features / 2 + tile * tile_rows / 2, box, block.full(state));
                } else {
                    tma_load_3d(to, product.weight, tile * tile_rows, box, block.full(state));
                }
                state.advance(block.stages);
            }
        }
    }
    wait(block.empty(state), state.phase ^ 1);
    header.product[state.stage] = kNone;
    arrive(block.issued(state));
    arrive(block.full(state));
}

// Adds x, and the weight of RMSNorm, to each stage once they may be read.
template <typename Config>
__device__ void produce_inputs(const Block &block) {
    const Params &params = block.params;
    // From here on this kernel may read what the previous kernel wrote, and may write. The next kernel starts only after
    // this wait, so it finds everything before this kernel in memory.
    wait_for_previous_kernel();
    allow_next_kernel();
    int readable = 0;  // the product whose x is there
    for (PipelineState state;; state.advance(block.stages)) {
        wait(block.issued(state), state.phase);
        const int number = block.header.product[state.stage];
        if (number == kNone) {
            arrive(block.full(state));
            break;
        }
        const ProductParams &product = params.products[number];
        const Product &a = product.a;
        if (readable < number) {
            const ProductParams &before = params.products[number - 1];
            wait_for_count(before.finished_tiles, before.tiles * Config::kEpilogueWarps);
            readable = number;
        }
        const int stage_boxes = Config::boxes_of(product.tile);
        const int box = block.header.box[state.stage];
        const int boxes = a.in_features / Config::kBoxColumns;
        const unsigned to = block.stage(state) + Config::kWeightBytes;
        const int input_bytes = a.rows * stage_boxes * Config::kBoxColumns * 2;
        const int norm_bytes =
            a.norm_weight == nullptr ? 0 : min(stage_boxes, boxes - box) * Config::kBoxColumns * 2;
        arrive_and_expect(block.full(state), input_bytes + norm_bytes);
        tma_load_3d(to, product.input, 0, box * Config::kInputBoxes, block.full(state));
        if (norm_bytes > 0) {
            tma_load_bulk(to + input_bytes, a.norm_weight + box * Config::kBoxColumns * 2, norm_bytes,
                          block.full(state));
        }
    }
    // This block has seen all products finished but the last. Once all blocks have, no block reads the counters.
    if (params.count > 1 && atomicAdd(params.exits, 1) == static_cast<int>(gridDim.x) - 1) {
        for (int number = 0; number < params.count - 1; ++number) {
            *params.products[number].finished_tiles = 0;  // for the next launch
        }
        *params.exits = 0;
    }
}

}  // namespace llama_te::gemv
