// Pages of an FP8 cache as bfloat16: arguments and entry points.
//
// Shapes: B rows, P pages of a row, K key/value heads, D size of a head.

#pragma once

#include <cstdint>

#include "include/cache.h"

namespace llama_te {

struct WidenPagesArguments {
    CacheMemory source;  // e4m3 [pages, page size, K, D]
    CacheScales scale;   // [pages, K, page size]
    CacheIndex index;
    std::int32_t rows;           // B
    std::int32_t pages_per_row;  // P
    std::int32_t kv_heads;       // K
    std::int32_t head_dim;       // D
    const std::int32_t *length;  // [B]
    char *target;                // bfloat16 [B * P, page size, K, D]

    // Pages that a row uses; none where its length is out of range.
    LLAMA_TE_HOST_DEVICE std::int32_t pages_of(std::int32_t row_length) const {
        return row_length > 0 && row_length <= index.capacity ? divide_up(row_length, index.block_places) : 0;
    }
    // Numbers of a page.
    LLAMA_TE_HOST_DEVICE std::int64_t page_elements() const {
        return static_cast<std::int64_t>(index.block_places) * kv_heads * head_dim;
    }
};

// Checks the values in `length` and the page table, which must be in host memory; the pages need not be. Throws
// std::invalid_argument.
void check_values(const WidenPagesArguments &arguments);

// Checks the values before it writes anything.
void widen_pages_cpu(const WidenPagesArguments &arguments);

// Checks nothing and does not wait for the GPU. `stream` is a cudaStream_t of `device`. Throws std::runtime_error
// where the launch fails. A build without CUDA does not have it.
void widen_pages_cuda(const WidenPagesArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
