// The producer: each warp loads its own tiles by TMA into its own ring of stages, and the block rotates the new token.

#pragma once

#include "include/e4m3.cuh"
#include "include/e4m3.h"
#include "include/rope.cuh"
#include "scheduler.cuh"

namespace llama_te::attention {

// A warp's ring, over all work items. A warp waits for as many copies as it starts, so one state serves both.
template <typename Shared>
struct Ring {
    unsigned stages;
    unsigned full;
    unsigned scales;
    PipelineState state;

    __device__ Ring(Shared &shared, int warp)
        : stages(shared_address(shared.stages[warp])),
          full(shared_address(shared.full[warp])),
          scales(shared_address(shared.scales_of(warp, 0))) {}

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

// Starts the copies of a warp's tiles of a work item. Each lane looks up the block of one of the next 32 tiles. The scales
// of an FP8 tile, a vector of the keys' and a vector of the values', are too little for TMA, whose setup takes a lane
// longer than the copy: two lanes copy one each.
template <typename Shared>
struct Producer {
    const Params &params;
    const WorkItem &item;
    const Ring<Shared> &ring;
    int block_of_lane = 0;
    int place_of_lane = 0;
    bool valid = true;

    __device__ Producer(const Params &params_, const WorkItem &item_, const Ring<Shared> &ring_, int first_tile)
        : params(params_), item(item_), ring(ring_) {
        look_up(first_tile);
    }

    // Loads a tile, which is the next one of the warp. Does nothing behind the last one.
    __device__ void load(int tile, int stage) {
        if (tile >= item.end_tile) {
            return;
        }
        const unsigned turn = turn_of(tile);
        const int block = __shfl_sync(kWholeWarp, block_of_lane, turn);
        const int place = __shfl_sync(kWholeWarp, place_of_lane, turn);
        const int lane = threadIdx.x % kWarp;
        const unsigned barrier = ring.barrier(stage);
        valid = valid && block >= 0;
        if (lane == 0) {
            if (block >= 0) {
                arrive_and_expect(barrier, Shared::kStageBytes);
                tma_load_5d(ring.at(stage), params.keys, block, place, item.kv_head, barrier);
                tma_load_5d(ring.at(stage) + Shared::kTileBytes, params.values, block, place, item.kv_head, barrier);
            } else {
                arrive(barrier);
            }
        }
        if (lane < Shared::kScaleVectors) {
            if (block >= 0) {
                const CacheScales scales = lane == 0 ? params.a.key_scale : params.a.value_scale;
                copy_vector(ring.scales + stage * Shared::kScaleBytes + lane * kVectorBytes,
                            scales.at(block, item.kv_head, place));
            }
            arrive_after_copies(barrier);
        }
        if (turn == kWarp - 1) {
            look_up(tile + kWarps);
        }
    }

    // The lane that has the block of a tile.
    __device__ static unsigned turn_of(int tile) {
        return static_cast<unsigned>(tile) / kWarps % kWarp;
    }

    // Looks up the blocks of the warp's tiles from `tile` on.
    __device__ void look_up(int tile) {
        const CacheIndex &index = params.a.index;
        const int tile_of_lane = tile + static_cast<int>((threadIdx.x - turn_of(tile)) % kWarp) * kWarps;
        if (tile_of_lane < item.end_tile) {
            block_of_lane = block_of(index, item.row, tile_of_lane * kTileKeys);
            place_of_lane = place_in_block(index, tile_of_lane * kTileKeys);
        }
    }
};

// Rotates the item's queries into shared memory. With the last split of a row it also rotates the new key, and writes the
// new key and value to the cache, but for an FP8 cache: see insert_new_fp8_token. All threads of the block call it.
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
        if (is_query || Shared::kIsFp8) {
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
    using T = Tile<kHeadDim, false>;
    constexpr int kVectors = Shared::kHeadVectors;
    const int lane = threadIdx.x % kWarp;
    char *const values = stage + Shared::kTileBytes;
    for (int i = lane; i < 2 * kVectors; i += kWarp) {
        char *const to = (i < kVectors ? stage : values) + T::offset(place, i % kVectors);
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(
            shared.heads[Shared::kNewKey + i / kVectors] + i % kVectors * kVectorBytes);
    }
    for (int i = (place + 1) * kVectors + lane; i < kTileKeys * kVectors; i += kWarp) {
        *reinterpret_cast<uint4 *>(values + T::offset(i / kVectors, i % kVectors)) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
}

// The same for an FP8 cache: rounds the new key and value, and writes them to the tile and to the cache, so that this step
// sees them as later ones do. All bytes behind the value are numbers, but the scales of a NaN there must not stay. All
// threads of the warp that has the row's last tile call it.
template <int kHeadDim, typename Shared>
__device__ void insert_new_fp8_token(const Arguments &a, const WorkItem &item, Shared &shared, char *stage,
                                     std::uint8_t *stage_scales, int place) {
    constexpr int kWords = kHeadDim / 4;  // of 4 numbers
    static_assert(kWords <= kWarp);
    const int lane = threadIdx.x % kWarp;
    const int block_place = place_in_block(a.index, item.start);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the key, the value
        uint2 four = make_uint2(0, 0);
        if (lane < kWords) {
            four = *reinterpret_cast<const uint2 *>(shared.heads[Shared::kNewKey + i] + lane * 4 * kElementBytes);
        }
        const unsigned greatest = max(greatest_bits_of(four.x), greatest_bits_of(four.y));
        const unsigned scale = scale_of_greatest(__reduce_max_sync(kWholeWarp, greatest));
        const float inverse = __uint_as_float(bits_of_inverse_scale(scale));
        const unsigned word = quantized_pair(four.x, inverse) | quantized_pair(four.y, inverse) << 16;
        if (lane < kWords) {
            const int offset = Tile<kHeadDim, true>::offset(place, lane / 4) + lane % 4 * 4;
            *reinterpret_cast<unsigned *>(stage + i * Shared::kTileBytes + offset) = word;
        }
        if (lane >= place && lane < kTileKeys) {
            stage_scales[i * kTileKeys + lane] = static_cast<std::uint8_t>(lane == place ? scale : kScaleOfOne);
        }
        if (item.new_block < 0) {
            continue;
        }
        const CacheMemory &cache = i == 0 ? a.key : a.value;
        const CacheScales &scales = i == 0 ? a.key_scale : a.value_scale;
        if (lane < kWords) {
            char *const to = cache.at(item.new_block, block_place) + item.kv_head * cache.head_stride + lane * 4;
            *reinterpret_cast<unsigned *>(to) = word;
        }
        if (lane == 0) {
            *scales.at(item.new_block, item.kv_head, block_place) = static_cast<std::uint8_t>(scale);
        }
    }
    __syncwarp();
}

}  // namespace llama_te::attention
