// The producer: each warp loads its own tiles by TMA into its own ring of stages, and the block rotates the new token.

#pragma once

#include "include/rope.cuh"
#include "scheduler.cuh"

namespace llama_te::attention {

// A warp's ring, over all work items. A warp waits for as many copies as it starts, so one state serves both.
template <typename Shared>
struct Ring {
    unsigned stages;
    unsigned full;
    PipelineState state;

    __device__ Ring(const Shared &shared, int warp)
        : stages(shared_address(shared.stages[warp])), full(shared_address(shared.full[warp])) {}

    __device__ unsigned at(int i) const {
        return stages + i * Shared::kStageBytes;
    }
    __device__ unsigned barrier(int i) const {
        return full + i * static_cast<int>(sizeof(std::uint64_t));
    }
    __device__ void advance() {
        state.advance(Shared::kStages);
    }
};

// Starts the copies of a warp's tiles of a work item. Each lane looks up the block of one of the next 32 tiles.
template <typename Shared>
struct Producer {
    const Params &params;
    const WorkItem &item;
    const Ring<Shared> &ring;
    int tile;  // the next one
    int turn = 0;
    int block_of_lane = 0;
    int place_of_lane = 0;
    bool valid = true;

    __device__ Producer(const Params &params_, const WorkItem &item_, const Ring<Shared> &ring_, int warp)
        : params(params_), item(item_), ring(ring_), tile(item_.first_tile + warp) {}

    // Does nothing behind the last tile.
    __device__ void load_next(int stage) {
        if (tile >= item.end_tile) {
            return;
        }
        if (turn == 0) {
            look_up();
        }
        const int block = __shfl_sync(kWholeWarp, block_of_lane, turn);
        const int place = __shfl_sync(kWholeWarp, place_of_lane, turn);
        valid = valid && block >= 0;
        if (threadIdx.x % kWarp == 0) {
            const unsigned barrier = ring.barrier(stage);
            if (block >= 0) {
                arrive_and_expect(barrier, Shared::kStageBytes);
                tma_load_5d(ring.at(stage), params.keys, block, place, item.kv_head, barrier);
                tma_load_5d(ring.at(stage) + Shared::kTileBytes, params.values, block, place, item.kv_head, barrier);
            } else {
                arrive(barrier);
            }
        }
        tile += kWarps;
        turn = (turn + 1) % kWarp;
    }

    __device__ void look_up() {
        const CacheIndex &index = params.a.index;
        const int tile_of_lane = tile + threadIdx.x % kWarp * kWarps;
        if (tile_of_lane < item.end_tile) {
            block_of_lane = block_of(index, item.row, tile_of_lane * kTileKeys);
            place_of_lane = place_in_block(index, tile_of_lane * kTileKeys);
        }
    }
};

// Rotates the item's queries into shared memory. With the last split of a row it also rotates the new key, and writes the
// new key and value to the cache. All threads of the block call it.
template <ElementType kElement, typename Shared>
__device__ void append_new_token(const Arguments &a, const WorkItem &item, Shared &shared) {
    constexpr int kFloatBytes = kVectorElements * static_cast<int>(sizeof(float));
    constexpr int kHalfBytes = Shared::kHalfVectors * kVectorBytes;
    const int heads = item.start < 0 ? 0 : item.has_new ? a.group + 2 : a.group;
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * Shared::kHalfVectors; i += kThreads) {
        const int head = i / Shared::kHalfVectors;
        const int vector = i % Shared::kHalfVectors;
        const int first_head = item.kv_head * (a.group + 2);
        const char *const from = a.qkv + item.row * a.qkv_row_stride +
                                 (first_head + head) * (2 * kHalfBytes) + vector * kVectorBytes;
        uint4 first = __ldcg(reinterpret_cast<const uint4 *>(from));
        uint4 second = __ldcg(reinterpret_cast<const uint4 *>(from + kHalfBytes));
        if (head <= a.group) {
            const char *const cos_sin = a.cos_sin + item.start * a.cos_sin_stride + vector * kFloatBytes;
            float cosine[kVectorElements];
            float sine[kVectorElements];
            load_floats(cos_sin, cosine);
            load_floats(cos_sin + Shared::kHalfVectors * kFloatBytes, sine);
            rotate<kElement>(first, second, cosine, sine);
        }
        const bool is_query = head < a.group;
        char *to = shared.heads[is_query ? head : Shared::kNewKey + head - a.group] + vector * kVectorBytes;
        *reinterpret_cast<uint4 *>(to) = first;
        *reinterpret_cast<uint4 *>(to + kHalfBytes) = second;
        if (is_query) {
            continue;
        }
        if (item.new_block >= 0) {
            const CacheMemory &cache = head == a.group ? a.key : a.value;
            to = cache.at(item.new_block, place_in_block(a.index, item.start)) + item.kv_head * cache.head_stride +
                 vector * kVectorBytes;
            *reinterpret_cast<uint4 *>(to) = first;
            *reinterpret_cast<uint4 *>(to + kHalfBytes) = second;
        }
    }
}

// Puts the new token's key and value at their place in a tile, and zeros behind the value: a weight of 0 times whatever
// lies there might be NaN. All threads of a warp call it.
template <int kHeadDim, typename Shared>
__device__ void insert_new_token(Shared &shared, char *stage, int place) {
    constexpr int kVectors = Shared::kHeadVectors;
    const int lane = threadIdx.x % kWarp;
    char *const values = stage + Shared::kTileBytes;
    for (int i = lane; i < 2 * kVectors; i += kWarp) {
        char *const to = (i < kVectors ? stage : values) + Tile<kHeadDim>::offset(place, i % kVectors);
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(
            shared.heads[Shared::kNewKey + i / kVectors] + i % kVectors * kVectorBytes);
    }
    for (int i = (place + 1) * kVectors + lane; i < kTileKeys * kVectors; i += kWarp) {
        *reinterpret_cast<uint4 *>(values + Tile<kHeadDim>::offset(i / kVectors, i % kVectors)) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
}

}  // namespace llama_te::attention
