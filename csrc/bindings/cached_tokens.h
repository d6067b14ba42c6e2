// The arguments that append_rope and decode_attention share: new tokens and the cache that they are appended to.
//
// Shapes: N new tokens, B rows of the batch, R rows of a cache, L places of a row, K key/value heads, G query heads per
// key/value head, D size of a head, P positions.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "arguments.h"
#include "include/cache.h"

namespace llama_te::bindings {

// The page table of a cache of this shape, which the caller names `table_name`, and the number of its rows.
struct Pages {
    Pages(const Tensor &cache, py::handle page_table, const py::object &device, const char *table_name = "page_table");

    std::optional<Tensor> table;
    CacheIndex index;
    std::int64_t rows;
    Name name;  // of the tensor that has the rows
};

struct CachedTokens {
    Tensor qkv;
    Tensor cos_sin;
    Tensor start;
    Tensor key;
    Tensor value;
    std::optional<Tensor> key_scale;  // of FP8 caches
    std::optional<Tensor> value_scale;
    Pages pages;
    ElementType element;
    std::int32_t kv_heads;
    std::int32_t group;
    std::int32_t head_dim;
    std::int32_t positions;

    std::int64_t heads() const {
        return std::int64_t{kv_heads} * group;
    }
    // Throws ValueError unless the cache has at least this many rows.
    void check_rows(std::int64_t rows) const;
    // What the operator writes: the caches, their scales and `output`.
    std::vector<const Tensor *> written(const Tensor &output) const;
    // Throws ValueError for memory that the kernel cannot load in vectors, or that overlaps what the operator writes.
    void check_memory(const char *operation, const Tensor &output) const;
    CacheMemory key_memory() const;
    CacheMemory value_memory() const;
    CacheScales key_scales() const;
    CacheScales value_scales() const;
};

CacheMemory memory_of(const Tensor &cache);
CacheScales scales_of(const Tensor &scale);

// `tokens` is the letter of the number of tokens. Throws TypeError or ValueError for arguments that do not fit.
CachedTokens cached_tokens(const char *operation, const char *tokens, Where where, py::handle qkv, py::handle cos_sin,
                           py::handle start, py::handle page_table, py::handle key_cache, py::handle value_cache,
                           py::handle key_scale, py::handle value_scale);

}  // namespace llama_te::bindings
