// Rotary embedding of new tokens and their append to a cache: arguments, limits and entry points.

#pragma once

#include <cstdint>

#include "include/cache.h"

namespace llama_te {

// Half of a head consists of whole vectors of 2-byte elements, and a few threads hold all of it.
constexpr int kHeadDimMultiple = 16;
constexpr int kMaxHeadDim = 256;

struct AppendArguments {
    ElementType element;
    const char *qkv;  // [N, K, G + 2, D]
    std::int64_t qkv_token_stride;
    std::int64_t tokens;      // N
    std::int32_t width;       // columns of a padded batch, 0 for packed tokens
    std::int32_t kv_heads;    // K
    std::int32_t group;       // G
    std::int32_t head_dim;    // D
    const char *cos_sin;      // float32 [P, D]
    std::int64_t cos_sin_stride;
    std::int32_t positions;      // P
    const std::int32_t *cu_new;  // [rows + 1]
    const std::int32_t *start;   // [rows]
    std::int32_t rows;
    CacheIndex index;
    char *query;  // [N, K * G, D]
    CacheMemory key;
    CacheMemory value;
    CacheScales key_scale;  // of FP8 caches, whose `element` is bfloat16
    CacheScales value_scale;

    bool is_fp8() const {
        return key_scale.data != nullptr;
    }
    LLAMA_TE_HOST_DEVICE int head_bytes() const {
        return head_dim * element_bytes(element);
    }
    // Heads of one token's qkv.
    LLAMA_TE_HOST_DEVICE int heads() const {
        return kv_heads * (group + 2);
    }
    LLAMA_TE_HOST_DEVICE char *query_head(std::int64_t token, int kv_head, int head_of_group) const {
        return query + ((token * kv_heads + kv_head) * group + head_of_group) * head_bytes();
    }
};

// Checks the values in `cu_new`, `start` and the page table, which must be in host memory; the caches need not be.
// Throws std::invalid_argument.
void check_values(const AppendArguments &arguments);

// Checks the values before it writes anything.
void append_rope_cpu(const AppendArguments &arguments);

// Checks nothing and does not wait for the GPU. `stream` is a cudaStream_t of `device`. Throws std::runtime_error
// where the launch fails. A build without CUDA does not have it.
void append_rope_cuda(const AppendArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
