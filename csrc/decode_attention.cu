// One decoding step's attention on the GPU: rotation, append to the cache and attention over it, in one launch.
//
// The work is cut into items: one part of a row's keys (decode_attention.h) for one key/value head. The grid fills the
// GPU, and a block takes every gridDim-th item; which these are it finds in the rows' lengths. Items of neighbouring
// heads go to neighbouring blocks, which so read neighbouring memory at about the same time.
//
// A warp of a block is on its own between the start and the end of an item: it takes every fourth tile of 16 keys, has
// the copy engine bring tiles into a ring of its own in shared memory, so that one copy at least is always under way,
// and keeps a softmax of its own. Then the block mixes what its warps have. If the row has more parts, that goes to the
// workspace, and the block that draws the last ticket of a row's head mixes the parts, in their order.
//
// Products run on tensor cores with keys, or dimensions of values, as the 16 rows of a fragment and query heads as its
// 8 columns: scores^T = keys query^T and output^T = values^T weights^T. So up to 8 query heads cost as much as one, and
// what a thread holds of the scores, of the softmax and of the output belongs to the same 2 heads.
//
// Shapes: B rows, K key/value heads, G query heads of each, D size of a head, P positions.

#include "copy_engine.cuh"
#include "decode_attention.h"
#include "rotation.cuh"
#include "warp.cuh"

namespace llama_te {

namespace {

using Arguments = DecodeAttentionArguments;

struct Task {
    Arguments a;
    CUtensorMap keys;
    CUtensorMap values;
};

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRowsOfThread = kMaxDecodeRows / kThreads;
constexpr int kElementBytes = 2;
constexpr int kVectorElements = kVectorBytes / kElementBytes;
constexpr int kColumns = 8;  // of a fragment: query heads
constexpr float kLog2E = 1.4426950408889634F;

// The sum of the weights of a part that read an invalid page: it has no result.
constexpr float kInvalid = -1.0F;

// --- instructions ------------------------------------------------------------------------------------------------

// A tile: 16 places of one head, as `map_of` cuts it.
__device__ void copy_tile(unsigned to, const CUtensorMap &map, int block, int place, int head, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
        "%6}], [%7];" ::"r"(to),
        "l"(&map), "r"(0), "r"(place), "r"(0), "r"(head), "r"(block), "r"(barrier)
        : "memory");
}

// Between what threads have written to shared memory and what the copy engine will write there.
__device__ void fence_before_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ void load_transposed_matrices(unsigned (&matrices)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}

__device__ unsigned transposed(unsigned matrix) {
    unsigned result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

// 2 to the power of `x`, with a relative error of 2^-22.
__device__ float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

template <ElementType kElement>
struct Numbers;

template <>
struct Numbers<ElementType::kBFloat16> {
    static __device__ unsigned pack(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const unsigned *>(&pair);
    }
    static __device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

template <>
struct Numbers<ElementType::kFloat16> {
    static __device__ unsigned pack(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const unsigned *>(&pair);
    }
    static __device__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

// --- shared memory -----------------------------------------------------------------------------------------------

// A part of a row.
struct Unit {
    int row;
    int part;
    int start;  // the place of the row's new token, -1: the row is left out
};

// A tile of keys or values in shared memory: boxes one behind the other, each 16 rows of as many vectors of a head as
// the copy engine can swizzle, 8, 4 or 2. It exchanges a row's vectors so that those of one column of 8 rows lie in
// different banks.
template <int kHeadDim>
struct Tile {
    static constexpr int kVectors = kHeadDim / kVectorElements;
    static constexpr int kBoxVectors = kVectors % 8 == 0 ? 8 : kVectors % 4 == 0 ? 4 : 2;
    static constexpr int kBoxes = kVectors / kBoxVectors;
    static constexpr int kRowBytes = kBoxVectors * kVectorBytes;
    static constexpr int kBoxBytes = kTileKeys * kRowBytes;
    static constexpr int kBytes = kBoxes * kBoxBytes;
    static_assert(kVectors % 2 == 0);

    static __device__ int swizzle_of(int row) {
        return row * kBoxVectors / 8 % kBoxVectors;
    }
    static __device__ int offset(int row, int vector) {
        return vector / kBoxVectors * kBoxBytes + row * kRowBytes +
               (vector % kBoxVectors ^ swizzle_of(row)) * kVectorBytes;
    }
};

// What a lane reads of a tile: of one row the even or the odd vectors. Most of `offset` is computed once.
template <int kHeadDim>
struct LaneRow {
    using T = Tile<kHeadDim>;
    unsigned row;
    unsigned swizzle;

    __device__ LaneRow(unsigned tile, int row_, int odd)
        : row(tile + row_ * T::kRowBytes), swizzle((T::swizzle_of(row_) ^ odd) * kVectorBytes) {}

    __device__ unsigned pair(int index) const {
        const int vector = 2 * index;
        return row + vector / T::kBoxVectors * T::kBoxBytes + (vector % T::kBoxVectors * kVectorBytes ^ swizzle);
    }
};

constexpr int kRingAlignment = 1024;  // of what the copy engine swizzles

template <int kHeadDim, int kHeadTiles>
struct alignas(kRingAlignment) Layout {
    static constexpr int kHeadVectors = kHeadDim / kVectorElements;
    static constexpr int kHalfVectors = kHeadVectors / 2;
    static constexpr int kSteps = kHeadDim / 16;  // fragments that span a head
    // An odd number of vectors, so that 8 heads' vectors of one column lie in different banks.
    static constexpr int kHeadBytes = (kHeadVectors | 1) * kVectorBytes;
    static constexpr int kTileBytes = Tile<kHeadDim>::kBytes;
    static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
    // Three blocks find room on a multiprocessor, which then has 100 KB and more under way.
    static constexpr int kStages = kHeadDim <= 64 ? 4 : kHeadDim <= 80 ? 3 : 2;
    static constexpr int kRingBytes = kStages * kStageBytes;
    static_assert(kStageBytes % kRingAlignment == 0);

    // What a warp has of a head in the end, over its ring: the 8 rows of a fragment by 4 pairs of heads, as threads
    // write them, lie in different banks.
    static constexpr int kResultHeads = kColumns * kHeadTiles;
    static constexpr int kResultFloats = kHeadDim + 4;
    static_assert(kResultFloats % 16 == 4);
    static_assert(kResultHeads * kResultFloats * static_cast<int>(sizeof(float)) <= kRingBytes);
    static_assert(kMaxParts * kMaxGroup * static_cast<int>(sizeof(float2)) <= kRingBytes);

    // Heads of the new token: queries, its key, its value.
    static constexpr int kNewKey = kResultHeads;
    static constexpr int kNewHeads = kResultHeads + 2;

    char rings[kWarps][kRingBytes];
    char heads[kNewHeads][kHeadBytes];
    float2 statistics[kWarps][kResultHeads];  // greatest score, sum of the weights
    std::uint64_t full[kWarps][kStages];  // barriers: a stage is there
    int units_of_warps[kWarps];
    Unit unit;
    bool draws_last;
};

// --- items -------------------------------------------------------------------------------------------------------

// The units of all rows are numbered row after row. A thread knows those of its rows.
struct RowUnits {
    int start[kRowsOfThread];  // as in Unit
    int first[kRowsOfThread];
    int count[kRowsOfThread];
};

// Returns how many units there are. The whole block calls it.
template <typename Shared>
__device__ int find_units(const Arguments &a, Shared &shared, RowUnits &units) {
    int of_thread = 0;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = threadIdx.x * kRowsOfThread + i;
        const int start = row < a.rows ? __ldcg(a.start + row) : -1;
        const bool exists = a.takes(start);
        units.start[i] = exists ? start : -1;
        units.first[i] = of_thread;
        // A row that is left out has one, which writes its zeros.
        units.count[i] = exists ? parts_of(start + 1) : static_cast<int>(row < a.rows);
        of_thread += units.count[i];
    }
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    int up_to = of_thread;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int before = __shfl_up_sync(kWholeWarp, up_to, distance);
        up_to += lane >= distance ? before : 0;
    }
    if (lane == kWarp - 1) {
        shared.units_of_warps[warp] = up_to;
    }
    __syncthreads();
    int before = up_to - of_thread;
    int all = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
        before += i < warp ? shared.units_of_warps[i] : 0;
        all += shared.units_of_warps[i];
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        units.first[i] += before;
    }
    return all;
}

// The block of memory that has a place of a row, or -1. Like all that is read before the wait below it comes from the
// L2 cache: the L1 may still have what an earlier kernel saw.
__device__ int block_of(const CacheIndex &index, int row, int place) {
    const int block =
        index.page_table == nullptr ? row : __ldcg(index.table_entry(row, place / index.block_places));
    return static_cast<unsigned>(block) < static_cast<unsigned>(index.blocks) ? block : -1;
}

__device__ int place_in_block(const CacheIndex &index, int place) {
    return place % index.block_places;  // a contiguous cache has one block to a row: the place itself
}

struct Item : Unit {
    int kv_head;
    int parts;  // of the row
    int first_tile;
    int end_tile;
    bool has_new;   // the new token is in this part
    int new_block;  // where it goes then, -1: nowhere

    __device__ Item(const Arguments &a, const Unit &unit, int kv_head_) : Unit(unit), kv_head(kv_head_) {
        const int tiles = keys_of_part(start + 1) / kTileKeys;
        parts = start < 0 ? 1 : parts_of(start + 1);
        first_tile = part * tiles;
        end_tile = min(first_tile + tiles, divide_up(start + 1, kTileKeys));
        has_new = start >= 0 && part == parts - 1;
        new_block = has_new ? block_of(a.index, row, start) : -1;
    }
};

// --- one warp's tiles ----------------------------------------------------------------------------------------------

// A warp's ring, over all items. As many copies are waited for as are begun, so that one place in it serves both.
template <typename Shared>
struct Ring {
    unsigned stages;
    unsigned full;
    int stage = 0;
    unsigned parity = 0;

    __device__ Ring(const Shared &shared, int warp)
        : stages(address_of(shared.rings[warp])), full(address_of(shared.full[warp])) {}

    __device__ unsigned at(int i) const {
        return stages + i * Shared::kStageBytes;
    }
    __device__ unsigned barrier(int i) const {
        return full + i * static_cast<int>(sizeof(std::uint64_t));
    }
    __device__ void advance() {
        stage += 1;
        if (stage == Shared::kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Begins the copies of a warp's tiles of an item. Each lane looks up where one of the next 32 lies.
template <typename Shared>
struct Copies {
    const Task &task;
    const Item &item;
    const Ring<Shared> &ring;
    int tile;  // the next one
    int turn = 0;
    int block_of_lane = 0;
    int place_of_lane = 0;
    bool valid = true;

    __device__ Copies(const Task &task_, const Item &item_, const Ring<Shared> &ring_, int warp)
        : task(task_), item(item_), ring(ring_), tile(item_.first_tile + warp) {}

    // Nothing behind the last tile.
    __device__ void next(int stage) {
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
                copy_tile(ring.at(stage), task.keys, block, place, item.kv_head, barrier);
                copy_tile(ring.at(stage) + Shared::kTileBytes, task.values, block, place, item.kv_head, barrier);
            } else {
                arrive(barrier);
            }
        }
        tile += kWarps;
        turn = (turn + 1) % kWarp;
    }

    __device__ void look_up() {
        const CacheIndex &index = task.a.index;
        const int tile_of_lane = tile + threadIdx.x % kWarp * kWarps;
        if (tile_of_lane < item.end_tile) {
            block_of_lane = block_of(index, item.row, tile_of_lane * kTileKeys);
            place_of_lane = place_in_block(index, tile_of_lane * kTileKeys);
        }
    }
};

// A softmax as far as a warp has come, and the values that it weighs. Scores are times log2(e). A thread has heads
// 2 (lane % 4) and the next of each head tile, and dimensions lane / 4 and 8 more of each 16.
template <ElementType kElement, int kHeadDim, int kHeadTiles>
struct Running {
    using Shared = Layout<kHeadDim, kHeadTiles>;
    using Number = Numbers<kElement>;

    float most[kHeadTiles][2];
    float sum[kHeadTiles][2];  // of this thread's keys
    float output[kHeadTiles][Shared::kSteps][4];

    __device__ Running() {
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
            most[t][0] = most[t][1] = -INFINITY;
            sum[t][0] = sum[t][1] = 0;
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                output[t][step][0] = output[t][step][1] = output[t][step][2] = output[t][step][3] = 0;
            }
        }
    }

    // `keys` are how many of the tile's places count.
    __device__ void take(unsigned stage, int keys, float scale,
                         const unsigned (&query)[kHeadTiles][Shared::kSteps][2]) {
        const int lane = threadIdx.x % kWarp;
        // Two sums, so that a product need not wait for the one before it.
        float scores[kHeadTiles][2][4] = {};
        const LaneRow<kHeadDim> key(stage, lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < Shared::kSteps; ++step) {
            unsigned keys_by_dims[4];
            load_matrices(keys_by_dims, key.pair(step));
#pragma unroll
            for (int t = 0; t < kHeadTiles; ++t) {
                Number::multiply_add(scores[t][step % 2], keys_by_dims, query[t][step]);
            }
        }

        unsigned weights[kHeadTiles][2];
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
            float score[4];  // keys lane / 4 and 8 more, by two heads
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] = (scores[t][0][i] + scores[t][1][i]) * scale;
                if (keys < kTileKeys && lane / 4 + i / 2 * 8 >= keys) {
                    score[i] = -INFINITY;
                }
            }
            raise(t, fmaxf(score[0], score[2]), fmaxf(score[1], score[3]));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] = power_of_two(score[i] - most[t][i % 2]);
                sum[t][i % 2] += score[i];
            }
            weights[t][0] = transposed(Number::pack(score[0], score[1]));
            weights[t][1] = transposed(Number::pack(score[2], score[3]));
        }

        const LaneRow<kHeadDim> value(stage + Shared::kTileBytes, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int step = 0; step < Shared::kSteps; ++step) {
            unsigned dims_by_keys[4];
            load_transposed_matrices(dims_by_keys, value.pair(step));
#pragma unroll
            for (int t = 0; t < kHeadTiles; ++t) {
                Number::multiply_add(output[t][step], dims_by_keys, weights[t]);
            }
        }
    }

    // Soon there is seldom a greater score than all before. The result is the same as without asking.
    __device__ void raise(int t, float first, float second) {
        if (!__any_sync(kWholeWarp, first > most[t][0] || second > most[t][1])) {
            return;
        }
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) {
            first = fmaxf(first, __shfl_xor_sync(kWholeWarp, first, distance));
            second = fmaxf(second, __shfl_xor_sync(kWholeWarp, second, distance));
        }
        const float new_most[2] = {fmaxf(most[t][0], first), fmaxf(most[t][1], second)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // A head whose scores are all -inf so far has nothing to scale, and -inf - -inf is NaN.
            const float factor = most[t][i] == new_most[i] ? 1.0F : power_of_two(most[t][i] - new_most[i]);
            most[t][i] = new_most[i];
            sum[t][i] *= factor;
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                output[t][step][i] *= factor;
                output[t][step][i + 2] *= factor;
            }
        }
    }

    // Over the warp's own ring, which it has read to the end.
    __device__ void put(Shared &shared, bool valid) {
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
        float *const result = reinterpret_cast<float *>(shared.rings[warp]);
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int head = t * kColumns + lane % 4 * 2 + i;
                float whole = sum[t][i];
#pragma unroll
                for (int distance = 4; distance < kWarp; distance *= 2) {
                    whole += __shfl_xor_sync(kWholeWarp, whole, distance);
                }
                if (lane < 4) {
                    shared.statistics[warp][head] = make_float2(most[t][i], valid ? whole : kInvalid);
                }
#pragma unroll
                for (int step = 0; step < Shared::kSteps; ++step) {
                    float *const to = result + head * Shared::kResultFloats + step * 16 + lane / 4;
                    to[0] = output[t][step][i];
                    to[8] = output[t][step][i + 2];
                }
            }
        }
    }
};

// --- what a block does together --------------------------------------------------------------------------------------

// Rotates the item's queries into shared memory and, with the last part of a row, its key; key and value go to the
// cache as well.
template <ElementType kElement, typename Shared>
__device__ void take_token(const Arguments &a, const Item &item, Shared &shared) {
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

// Puts the new token's key and value to their place in a tile, and zeros for values behind it: a weight of 0 times what
// lies there might be NaN. A warp does that.
template <int kHeadDim, typename Shared>
__device__ void put_token(Shared &shared, char *stage, int place) {
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

// 4 dimensions of a head, not yet divided by the sum of the weights.
struct Mixture {
    float2 statistics;
    float4 values;
};

// `statistics_of(i)` and `values_of(i)` are those of the i-th of `count` that each had some of the keys.
template <typename Statistics, typename Values>
__device__ Mixture mix(int count, Statistics statistics_of, Values values_of) {
    float most = -INFINITY;
    bool valid = true;
    for (int i = 0; i < count; ++i) {
        const float2 statistics = statistics_of(i);
        most = fmaxf(most, statistics.x);
        valid = valid && !(statistics.y < 0);
    }
    float sum = 0;
    float4 values = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        const float2 statistics = statistics_of(i);
        const float4 some = values_of(i);
        const float weight = power_of_two(statistics.x - most);
        sum += weight * statistics.y;
        values.x += weight * some.x;
        values.y += weight * some.y;
        values.z += weight * some.z;
        values.w += weight * some.w;
    }
    return {make_float2(most, valid ? sum : kInvalid), values};
}

template <ElementType kElement, int kHeadDim>
__device__ void write_output(const Arguments &a, const Item &item, int head, int dim, const Mixture &mixed) {
    using Number = Numbers<kElement>;
    const bool valid = !(mixed.statistics.y < 0);
    const float factor = 1.0F / mixed.statistics.y;
    uint2 packed = make_uint2(0, 0);
    if (valid) {
        packed.x = Number::pack(mixed.values.x * factor, mixed.values.y * factor);
        packed.y = Number::pack(mixed.values.z * factor, mixed.values.w * factor);
    }
    const std::int64_t query_head = (static_cast<std::int64_t>(item.row) * a.kv_heads + item.kv_head) * a.group + head;
    *reinterpret_cast<uint2 *>(a.output + (query_head * kHeadDim + dim) * kElementBytes) = packed;
}

// Runs `function(head, dim)` for 4 dimensions from `dim` of each query head.
template <int kHeadDim, typename Function>
__device__ void for_output(int group, Function function) {
#pragma unroll 1
    for (int i = threadIdx.x; i < group * (kHeadDim / 4); i += kThreads) {
        function(i / (kHeadDim / 4), i % (kHeadDim / 4) * 4);
    }
}

// Whether all other parts of the row are done for this head: their results can be read then.
template <typename Shared>
__device__ bool draw_last_ticket(const Arguments &a, const Item &item, Shared &shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        std::int32_t *const ticket = a.ticket(item.row, item.kv_head);
        std::int32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
        shared.draws_last = before == item.parts - 1;
        if (shared.draws_last) {
            *ticket = 0;  // for the next launch
        }
    }
    __syncthreads();
    return shared.draws_last;
}

template <ElementType kElement, int kHeadDim, typename Shared>
__device__ void merge_parts(const Arguments &a, const Item &item, Shared &shared) {
    constexpr int kFloats = kHeadDim + kStatistics;
    auto *const statistics = reinterpret_cast<float2 *>(shared.rings[0]);  // [parts, G]
    for (int i = threadIdx.x; i < item.parts * a.group; i += kThreads) {
        const float *const partial = a.partial(item.row, item.kv_head, i / a.group);
        statistics[i] = __ldcg(reinterpret_cast<const float2 *>(partial + i % a.group * kFloats + kHeadDim));
    }
    __syncthreads();
    const float *const first = a.partial(item.row, item.kv_head, 0);
    const int part_floats = a.group * kFloats;
    for_output<kHeadDim>(a.group, [&](int head, int dim) {
        const Mixture mixed = mix(
            item.parts, [&](int part) { return statistics[part * a.group + head]; },
            [&](int part) {
                return __ldcg(reinterpret_cast<const float4 *>(first + part * part_floats + head * kFloats + dim));
            });
        write_output<kElement, kHeadDim>(a, item, head, dim, mixed);
    });
}

template <ElementType kElement, int kHeadDim, typename Shared>
__device__ void finish(const Arguments &a, const Item &item, Shared &shared) {
    float *const partial = a.partial(item.row, item.kv_head, item.part);
    for_output<kHeadDim>(a.group, [&](int head, int dim) {
        const Mixture mixed = mix(
            kWarps, [&](int warp) { return shared.statistics[warp][head]; },
            [&](int warp) {
                const float *const result = reinterpret_cast<const float *>(shared.rings[warp]);
                return *reinterpret_cast<const float4 *>(result + head * Shared::kResultFloats + dim);
            });
        if (item.parts == 1) {
            write_output<kElement, kHeadDim>(a, item, head, dim, mixed);
            return;
        }
        float *const to = partial + head * (kHeadDim + kStatistics);
        *reinterpret_cast<float4 *>(to + dim) = mixed.values;
        if (dim == 0) {
            *reinterpret_cast<float2 *>(to + kHeadDim) = mixed.statistics;
        }
    });
    if (item.parts > 1 && draw_last_ticket(a, item, shared)) {
        merge_parts<kElement, kHeadDim>(a, item, shared);
    }
}

// --- the kernel --------------------------------------------------------------------------------------------------

template <ElementType kElement, int kHeadDim, int kHeadTiles>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const __grid_constant__ Task task) {
    using Shared = Layout<kHeadDim, kHeadTiles>;
    extern __shared__ __align__(kRingAlignment) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Arguments &a = task.a;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const float scale = a.scale * kLog2E;
    cudaTriggerProgrammaticLaunchCompletion();  // the next one, if it need not wait itself, finds room at once

    if (lane == 0) {
        for (int stage = 0; stage < Shared::kStages; ++stage) {
            initialize(address_of(&shared.full[warp][stage]), 1);
        }
        publish_barriers();
    }

    // Columns of fragments without a query head count nowhere, but should not be whatever lay here.
#pragma unroll 1
    for (int i = threadIdx.x; i < kColumns * kHeadTiles * Shared::kHeadVectors; i += kThreads) {
        const int head = i / Shared::kHeadVectors;
        if (head >= a.group) {
            const int vector_bytes = i % Shared::kHeadVectors * kVectorBytes;
            *reinterpret_cast<uint4 *>(shared.heads[head] + vector_bytes) = make_uint4(0, 0, 0, 0);
        }
    }

    RowUnits units;
    const int items = find_units(a, shared, units) * a.kv_heads;
    Ring<Shared> ring(shared, warp);
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
        const int unit = i / a.kv_heads;
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
            if (unit >= units.first[r] && unit < units.first[r] + units.count[r]) {
                const int row = static_cast<int>(threadIdx.x) * kRowsOfThread + r;
                shared.unit = Unit{row, unit - units.first[r], units.start[r]};
            }
        }
        fence_before_copies();
        __syncthreads();  // also: nobody reads the rings any more
        const Item item(a, shared.unit, i - unit * a.kv_heads);

        Copies<Shared> copies(task, item, ring, warp);
#pragma unroll 1
        for (int i = 0; i < Shared::kStages; ++i) {
            copies.next((ring.stage + i) % Shared::kStages);
        }

        // Until here the kernel ahead on the stream may still be running, and nothing that it writes has been read, nor
        // has anything been written. `start`, the page table and the keys and values of earlier tokens, which have been
        // read, are an earlier step's, which is over: see decode_attention.py. From the second item on the wait is over
        // at once.
        cudaGridDependencySynchronize();

        take_token<kElement>(a, item, shared);
        __syncthreads();
        unsigned query[kHeadTiles][Shared::kSteps][2];
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
            const char *const head = shared.heads[t * kColumns + lane / 4] + lane % 4 * 2 * kElementBytes;
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                query[t][step][0] = *reinterpret_cast<const unsigned *>(head + step * 2 * kVectorBytes);
                query[t][step][1] = *reinterpret_cast<const unsigned *>(head + step * 2 * kVectorBytes + kVectorBytes);
            }
        }

        Running<kElement, kHeadDim, kHeadTiles> running;
        for (int tile = item.first_tile + warp; tile < item.end_tile; tile += kWarps) {
            wait(ring.barrier(ring.stage), ring.parity);
            const int keys = item.start + 1 - tile * kTileKeys;
            if (keys <= kTileKeys) {
                put_token<kHeadDim>(shared, shared.rings[warp] + ring.stage * Shared::kStageBytes, keys - 1);
            }
            running.take(ring.at(ring.stage), keys, scale, query);
            __syncwarp();
            copies.next(ring.stage);
            ring.advance();
        }
        running.put(shared, copies.valid && item.start >= 0);
        __syncthreads();
        finish<kElement, kHeadDim>(a, item, shared);
    }
}

// Keys or values as the copy engine sees them, tile by tile.
template <int kHeadDim>
CUtensorMap map_of(const CacheMemory &cache, const Arguments &a) {
    using T = Tile<kHeadDim>;
    const cuuint64_t sizes[] = {T::kBoxVectors * kVectorElements, static_cast<cuuint64_t>(a.index.block_places),
                                T::kBoxes, static_cast<cuuint64_t>(a.kv_heads),
                                static_cast<cuuint64_t>(a.index.blocks)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(cache.place_stride), T::kRowBytes,
                                  static_cast<cuuint64_t>(cache.head_stride),
                                  static_cast<cuuint64_t>(cache.block_stride)};
    const cuuint32_t box[] = {T::kBoxVectors * kVectorElements, kTileKeys, T::kBoxes, 1, 1};
    constexpr CUtensorMapSwizzle kSwizzle = T::kBoxVectors == 8   ? CU_TENSOR_MAP_SWIZZLE_128B
                                            : T::kBoxVectors == 4 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
    // Only copied, so that any type of 2 bytes is as good.
    return encode_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, cache.data, sizes, strides, box, kSwizzle);
}

template <ElementType kElement, int kHeadDim, int kHeadTiles>
void launch(const Arguments &a, int device, cudaStream_t stream) {
    const auto kernel = decode_attention_kernel<kElement, kHeadDim, kHeadTiles>;
    constexpr int kSharedBytes = sizeof(Layout<kHeadDim, kHeadTiles>);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "decode_attention");
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, kSharedBytes),
               "decode_attention");
    blocks *= multiprocessors(device);
    const int items = a.rows * a.kv_heads * most_parts_of(a.index.capacity);

    const dim3 grid(items < blocks ? items : blocks);
    const Task task = {a, map_of<kHeadDim>(a.key, a), map_of<kHeadDim>(a.value, a)};
    launch_overlapping(kernel, {grid, dim3(kThreads), kSharedBytes}, stream, "decode_attention", task);
}

template <ElementType kElement, int kHeadDim>
void choose_head_tiles(const Arguments &a, int device, cudaStream_t stream) {
    if (a.group <= kColumns) {
        launch<kElement, kHeadDim, 1>(a, device, stream);
    } else {
        launch<kElement, kHeadDim, 2>(a, device, stream);
    }
}

template <ElementType kElement>
void choose_head_dim(const Arguments &a, int device, cudaStream_t stream) {
    switch (a.head_dim) {
        case 64:
            return choose_head_tiles<kElement, 64>(a, device, stream);
        case 80:
            return choose_head_tiles<kElement, 80>(a, device, stream);
        case 96:
            return choose_head_tiles<kElement, 96>(a, device, stream);
        case 128:
            return choose_head_tiles<kElement, 128>(a, device, stream);
        default:
            throw std::invalid_argument("decode_attention has no kernel for heads of " + std::to_string(a.head_dim));
    }
}

}  // namespace

void decode_attention_cuda(const Arguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    switch (arguments.element) {
        case ElementType::kBFloat16:
            return choose_head_dim<ElementType::kBFloat16>(arguments, device, cuda_stream);
        case ElementType::kFloat16:
            return choose_head_dim<ElementType::kFloat16>(arguments, device, cuda_stream);
        case ElementType::kFloat32:
            throw std::invalid_argument("decode_attention has no kernel for float32");
    }
}

}  // namespace llama_te
