// Attention of one decoding step: arguments and entry point.

#pragma once

#include <cstdint>

#include "heuristics.h"
#include "include/cache.h"

namespace llama_te {

using DecodeElements = Values<ElementType::kBFloat16, ElementType::kFloat16>;
using DecodeHeadDims = Values<64, 80, 96, 128>;

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
    std::int32_t *workspace;  // of decode_attention_workspace() numbers
    CacheScales key_scale;    // of FP8 caches, whose `element` is bfloat16
    CacheScales value_scale;

    bool is_fp8() const {
        return key_scale.data != nullptr;
    }

    // Whether there is room for a token at `position`.
    LLAMA_TE_HOST_DEVICE bool takes(std::int32_t position) const {
        return position >= 0 && position < positions && position < index.capacity;
    }
    LLAMA_TE_HOST_DEVICE std::int32_t *semaphore(int row, int kv_head) const {
        return workspace + row * kv_heads + kv_head;
    }
    // The partial result of a split: [G, D + kStatistics].
    LLAMA_TE_HOST_DEVICE float *partial(int row, int kv_head, int split) const {
        const std::int64_t place =
            (static_cast<std::int64_t>(row) * kv_heads + kv_head) * max_splits(index.capacity) + split;
        return reinterpret_cast<float *>(workspace + kDecodeSemaphores) + place * group * (head_dim + kStatistics);
    }
};

// Checks the values in `start` and the page table, which must be in host memory; the caches need not be. Throws
// std::invalid_argument.
void check_values(const DecodeAttentionArguments &arguments);

// Rotates the new tokens, with `output` for the queries, and appends them. Checks the values before it writes anything.
void decode_attention_append_cpu(const DecodeAttentionArguments &arguments);

// Checks nothing and does not wait for the GPU. `stream` is a cudaStream_t of `device`. Throws std::runtime_error where
// the launch fails. A build without CUDA does not have it.
void decode_attention_cuda(const DecodeAttentionArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
