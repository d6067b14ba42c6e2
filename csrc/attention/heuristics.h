// How decode attention splits the keys of a row over thread blocks (split-KV), and the workspace that this needs.

#pragma once

#include <cstdint>

#include "include/integer.h"

namespace llama_te {

// Keys of a tile: the rows of one tensor core product. Pages hold whole tiles.
constexpr int kTileKeys = 16;
constexpr int kMaxDecodeRows = 256;
constexpr int kMaxDecodeGroup = 16;
constexpr int kMaxDecodeKvHeads = 64;

// The splits depend on the row's length alone, so that a row's result does not depend on its batch. Splits of short rows
// are short, so that many blocks work on a single row. Splits of long rows are longer, since the start and the end of a
// split take as long as hundreds of keys. One block combines the splits, so there are few of them.
constexpr int kShortRowKeys = 4096;
constexpr int kShortSplitKeys = 256;
constexpr int kLongSplitKeys = 512;
constexpr int kMaxSplits = 48;

// Keys of each split but the last, for a row of `keys`.
LLAMA_TE_HOST_DEVICE constexpr int keys_per_split(int keys) {
    const int even = divide_up(divide_up(keys, kMaxSplits), kTileKeys) * kTileKeys;
    const int least = keys <= kShortRowKeys ? kShortSplitKeys : kLongSplitKeys;
    return even > least ? even : least;
}

LLAMA_TE_HOST_DEVICE constexpr int splits_of(int keys) {
    return divide_up(keys, keys_per_split(keys));
}

// The most splits of any row of up to `keys`.
LLAMA_TE_HOST_DEVICE constexpr int max_splits(int keys) {
    const int of_short = divide_up(keys < kShortRowKeys ? keys : kShortRowKeys, kShortSplitKeys);
    const int of_long = keys > kShortRowKeys ? divide_up(keys, kLongSplitKeys) : 0;
    const int splits = of_short > of_long ? of_short : of_long;
    return splits < kMaxSplits ? splits : kMaxSplits;
}

// The workspace starts with a semaphore for each key/value head of each row: the number of finished splits. That part
// has the same size for every batch, so that one workspace serves calls of different shapes. Behind it lie the splits'
// partial results: for each query head D sums of values, the greatest score, the sum of the weights, and 2 numbers that
// fill up a vector.
constexpr int kDecodeSemaphores = kMaxDecodeKvHeads * kMaxDecodeRows;
constexpr int kStatistics = 4;

// Numbers of 4 bytes in the workspace.
constexpr std::int64_t decode_attention_workspace(std::int64_t rows, int kv_heads, int group, int head_dim,
                                                  int capacity) {
    return kDecodeSemaphores + rows * kv_heads * max_splits(capacity) * group * (head_dim + kStatistics);
}

}  // namespace llama_te
