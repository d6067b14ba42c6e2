// The arguments of decode attention, how it divides its work, and its entry point.

#pragma once

#include "kernels.h"

namespace llama_te {

// Keys that a warp takes at a time, what one matrix product of the tensor cores spans. Pages hold whole tiles.
constexpr int kTileKeys = 16;
constexpr int kMaxDecodeRows = 256;
constexpr int kMaxGroup = 16;
constexpr int kMaxKvHeads = 64;
constexpr int kDecodeHeadDims[] = {64, 80, 96, 128};

// A row's keys are divided into parts, which different blocks take. The division depends on the row's length alone, so
// that what comes out for a row does not depend on its batch. Parts of short rows are short, to have many blocks at work
// for a single row; those of long ones are longer, since a part's start and end take as long as hundreds of keys. And
// there are few enough of them to be merged quickly by one block.
constexpr int kShortRowKeys = 4096;
constexpr int kShortPartKeys = 256;
constexpr int kLongPartKeys = 512;
constexpr int kMaxParts = 48;

LLAMA_TE_HOST_DEVICE constexpr int divide_up(int dividend, int divisor) {
    return dividend / divisor + (dividend % divisor != 0 ? 1 : 0);
}

// Keys of each part but the last, of a row of `keys`.
LLAMA_TE_HOST_DEVICE constexpr int keys_of_part(int keys) {
    const int even = divide_up(divide_up(keys, kMaxParts), kTileKeys) * kTileKeys;
    const int least = keys <= kShortRowKeys ? kShortPartKeys : kLongPartKeys;
    return even > least ? even : least;
}

LLAMA_TE_HOST_DEVICE constexpr int parts_of(int keys) {
    return divide_up(keys, keys_of_part(keys));
}

// Of any row that has at most `keys`.
LLAMA_TE_HOST_DEVICE constexpr int most_parts_of(int keys) {
    const int of_short = divide_up(keys < kShortRowKeys ? keys : kShortRowKeys, kShortPartKeys);
    const int of_long = keys > kShortRowKeys ? divide_up(keys, kLongPartKeys) : 0;
    const int parts = of_short > of_long ? of_short : of_long;
    return parts < kMaxParts ? parts : kMaxParts;
}

// The workspace begins with a ticket for each key/value head of each row: the number of its parts that are done. It is
// as large for any batch, so that one workspace serves calls of different shapes. The parts' results lie behind it: for
// each query head D sums of values, the greatest score and the sum of the weights, and 2 numbers to fill a vector.
constexpr int kTickets = kMaxKvHeads * kMaxDecodeRows;
constexpr int kStatistics = 4;

constexpr std::int64_t decode_attention_workspace(std::int64_t rows, int kv_heads, int group, int head_dim,
                                                  int capacity) {
    return kTickets + rows * kv_heads * most_parts_of(capacity) * group * (head_dim + kStatistics);
}

struct DecodeAttentionArguments {
    ElementType element;
    const char *qkv;  // [B, K, G + 2, D]
    std::int64_t qkv_row_stride;
    std::int32_t rows;      // B
    std::int32_t kv_heads;  // K
    std::int32_t group;     // G
    std::int32_t head_dim;  // D
    const char *cos_sin;    // float32 [P, D]
    std::int64_t cos_sin_stride;
    std::int32_t positions;     // P
    const std::int32_t *start;  // [B]
    CacheIndex index;
    CacheMemory key;
    CacheMemory value;
    float scale;
    char *output;             // [B, K * G, D]
    std::int32_t *workspace;  // decode_attention_workspace() numbers of 4 bytes

    // Whether there is room for a token of position `position`.
    LLAMA_TE_HOST_DEVICE bool takes(std::int32_t position) const {
        return position >= 0 && position < positions && position < index.capacity;
    }
    LLAMA_TE_HOST_DEVICE std::int32_t *ticket(int row, int kv_head) const {
        return workspace + row * kv_heads + kv_head;
    }
    // What part `part` of a row leaves: [G, D + kStatistics].
    LLAMA_TE_HOST_DEVICE float *partial(int row, int kv_head, int part) const {
        const std::int64_t place =
            (static_cast<std::int64_t>(row) * kv_heads + kv_head) * most_parts_of(index.capacity) + part;
        return reinterpret_cast<float *>(workspace + kTickets) + place * group * (head_dim + kStatistics);
    }
};

// Checks nothing and does not wait for the GPU. `stream` is a cudaStream_t of `device`. A launch that fails throws
// std::runtime_error.
void decode_attention_cuda(const DecodeAttentionArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
