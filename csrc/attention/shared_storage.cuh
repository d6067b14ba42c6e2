// The shared memory of a thread block of decode attention, and the swizzle of tiles of keys and values.

#pragma once

#include <cstdint>

#include "decode_attention.h"
#include "include/tma.cuh"
#include "include/warp.cuh"

namespace llama_te::attention {

using Arguments = DecodeAttentionArguments;

struct Params {
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

// The sum of the weights of a split that read an invalid page: the split has no result.
constexpr float kInvalid = -1.0F;

// One split of a row.
struct Split {
    int row;
    int index;
    int start;  // the place of the row's new token, -1: the row is left out
};

// A tile of keys or values: boxes one behind the other, each 16 rows of as many vectors of a head as TMA can swizzle, 8,
// 4 or 2. The swizzle exchanges the vectors of a row, so that the vectors of one column of 8 rows lie in different banks.
// They do without a swizzle where a head has an odd number of vectors, and then a row of the box is the whole head.
template <int kHeadDim, bool kFp8>
struct Tile {
    static constexpr int kVectors = kHeadDim * (kFp8 ? 1 : kElementBytes) / kVectorBytes;
    static constexpr bool kIsSwizzled = kVectors % 2 == 0;
    static constexpr int kBoxVectors = kVectors % 8 == 0 ? 8 : kVectors % 4 == 0 ? 4 : kIsSwizzled ? 2 : kVectors;
    static constexpr int kBoxes = kVectors / kBoxVectors;
    static constexpr int kRowBytes = kBoxVectors * kVectorBytes;
    static constexpr int kBoxBytes = kTileKeys * kRowBytes;
    static constexpr int kBytes = kBoxes * kBoxBytes;
    // TMA wants boxes at multiples of 128 bytes, and the swizzle follows from the address: it repeats after 8 rows.
    static_assert(kBytes % (kIsSwizzled ? 8 * kRowBytes : 128) == 0);

    static __device__ int swizzle_of(int row) {
        return kIsSwizzled ? row * kBoxVectors / 8 % kBoxVectors : 0;
    }
    static __device__ int offset(int row, int vector) {
        return vector / kBoxVectors * kBoxBytes + row * kRowBytes +
               (vector % kBoxVectors ^ swizzle_of(row)) * kVectorBytes;
    }
};

// The addresses that a lane reads of a tile: the even or the odd vectors of one row. Most of `offset` is computed once. A
// swizzled row lies at a multiple of its size, a power of two, so the swizzle of its vectors is one of whole addresses.
template <int kHeadDim, bool kFp8>
struct LaneRow {
    using T = Tile<kHeadDim, kFp8>;
    unsigned first;

    __device__ LaneRow(unsigned tile, int row, int odd)
        : first(tile + row * T::kRowBytes + (T::swizzle_of(row) ^ odd) * kVectorBytes) {}

    __device__ unsigned pair(int index) const {
        const int box = 2 * index / T::kBoxVectors;
        const int bytes = 2 * index % T::kBoxVectors * kVectorBytes;
        return box * T::kBoxBytes + (T::kIsSwizzled ? first ^ bytes : first + bytes);
    }
};

constexpr int kStageAlignment = 1024;  // which TMA's swizzle needs

template <int kHeadDim, int kHeadTiles, bool kFp8>
struct alignas(kStageAlignment) SharedStorage {
    static constexpr bool kIsFp8 = kFp8;
    static constexpr int kHeadVectors = kHeadDim / kVectorElements;
    static constexpr int kHalfVectors = kHeadVectors / 2;
    static constexpr int kSteps = kHeadDim / 16;  // fragments of a head
    // An odd number of vectors, so that 8 heads' vectors of one column lie in different banks.
    static constexpr int kHeadBytes = (kHeadVectors | 1) * kVectorBytes;
    static constexpr int kTileBytes = Tile<kHeadDim, kFp8>::kBytes;
    static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
    static constexpr int kScaleVectors = kFp8 ? 2 : 0;  // of a stage: the keys' scales, then the values'
    static constexpr int kScaleBytes = kScaleVectors * kVectorBytes;
    static_assert(!kFp8 || kTileKeys == kVectorBytes);
    // Blocks that fit on a multiprocessor, which then has 100 KB and more on their way. A warp mostly waits: for copies,
    // for its own products, for the other warps. An FP8 tile has half the bytes and as many products, so more warps must
    // fill the time. With a second tile of heads a warp has too many registers for that.
    static constexpr int kBlocks = kFp8 && kHeadTiles == 1 ? 5 : 3;
    static constexpr int kStages = (kHeadDim <= 64 ? 4 : kHeadDim <= 80 ? 3 : 2) * (kFp8 && kHeadTiles > 1 ? 2 : 1);
    static constexpr int kRingBytes = kStages * kStageBytes;

    // A warp's result lies over its stages. The 8 rows of a fragment and 4 pairs of heads, as threads write them, lie in
    // different banks.
    static constexpr int kResultHeads = kColumns * kHeadTiles;
    static constexpr int kResultFloats = kHeadDim + 4;
    static_assert(kResultFloats % 16 == 4);
    static_assert(kResultHeads * kResultFloats * static_cast<int>(sizeof(float)) <= kRingBytes);
    static_assert(kMaxSplits * kMaxDecodeGroup * static_cast<int>(sizeof(float2)) <= kRingBytes);

    // Heads of the new token: queries, its key, its value.
    static constexpr int kNewKey = kResultHeads;
    static constexpr int kNewHeads = kResultHeads + 2;

    char stages[kWarps][kRingBytes];
    char heads[kNewHeads][kHeadBytes];
    float2 statistics[kWarps][kResultHeads];  // greatest score, sum of the weights
    std::uint64_t full[kWarps][kStages];      // barriers: a stage is there
    int starts[kMaxDecodeRows];      // as in Split
    int end_splits[kMaxDecodeRows];  // the number of the split behind each row's last
    int splits_of_warps[kWarps];
    Split split;
    bool is_last;
    // Of a cache without scales this is one byte, which costs nothing.
    alignas(kFp8 ? kVectorBytes : 1) std::uint8_t scales[kFp8 ? kWarps * kStages * kScaleBytes : 1];

    __device__ std::uint8_t *scales_of(int warp, int stage) {
        return scales + (warp * kStages + stage) * kScaleBytes;
    }
};

}  // namespace llama_te::attention
