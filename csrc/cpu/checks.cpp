// Checks of operators' arguments, with messages for the caller. The kernels themselves report nothing.

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention/decode_attention.h"
#include "cache/append_rope.h"
#include "cache/reorder.h"

namespace llama_te {

namespace {

std::string operator+(const std::string &text, std::int64_t number) {
    return text + std::to_string(number);
}

[[noreturn]] void refuse(const std::string &message) {
    throw std::invalid_argument(message);
}

void check_aligned(const char *name, const void *data, std::initializer_list<std::int64_t> strides) {
    if (reinterpret_cast<std::uintptr_t>(data) % kVectorBytes != 0) {
        refuse(std::string(name) + " starts at an address that is not a multiple of 16 bytes: pass a tensor whose " +
               "storage_offset is a multiple of 16 bytes, or a copy");
    }
    for (const std::int64_t stride : strides) {
        if (stride % kVectorBytes != 0) {
            refuse(std::string(name) + " has a stride of " + stride + " bytes; all but the last dimension's must be " +
                   "multiples of 16 bytes");
        }
    }
}

struct Range {
    const char *name;
    const char *begin;
    const char *end;
};

template <typename Arguments>
Range cache_range(const char *name, const CacheMemory &cache, const Arguments &a) {
    const std::int64_t last = (a.index.blocks - 1) * cache.block_stride +
                              (a.index.block_places - 1) * cache.place_stride +
                              (a.kv_heads - 1) * cache.head_stride + a.head_dim * element_bytes(a.element);
    return {name, cache.data, cache.data + last};
}

void check_apart(const Range &one, const Range &other) {
    if (one.begin < other.end && other.begin < one.end) {
        refuse(std::string(one.name) + " and " + other.name + " share memory: pass tensors that do not overlap");
    }
}

std::string entry(const char *name, int row, std::int64_t value) {
    return std::string(name) + "[" + row + "]=" + value;
}

// The checks that append_rope and decode_attention share: `tokens` tokens of `qkv` are read, `output` and the caches are
// written. Returns the ranges of memory.
template <typename Arguments>
std::vector<Range> check_tokens_and_cache(const Arguments &a, std::int64_t tokens, std::int64_t token_stride,
                                          const Range &output) {
    check_aligned("qkv", a.qkv, {token_stride});
    check_aligned("cos_sin", a.cos_sin, {a.cos_sin_stride});
    check_aligned(output.name, output.begin, {});
    check_aligned("key_cache", a.key.data, {a.key.block_stride, a.key.place_stride, a.key.head_stride});
    check_aligned("value_cache", a.value.data, {a.value.block_stride, a.value.place_stride, a.value.head_stride});
    const int head_bytes = a.head_dim * element_bytes(a.element);
    const std::int64_t token_bytes = std::int64_t{a.kv_heads} * (a.group + 2) * head_bytes;
    const Range qkv{"qkv", a.qkv, a.qkv + (tokens - 1) * token_stride + token_bytes};
    const Range cos_sin{"cos_sin", a.cos_sin,
                        a.cos_sin + (a.positions - 1) * a.cos_sin_stride +
                            a.head_dim * static_cast<std::int64_t>(sizeof(float))};
    const Range key = cache_range("key_cache", a.key, a);
    const Range value = cache_range("value_cache", a.value, a);
    for (const Range &input : {qkv, cos_sin}) {
        for (const Range &written : {output, key, value}) {
            check_apart(input, written);
        }
    }
    check_apart(output, key);
    check_apart(output, value);
    // Keys and values may lie interleaved in one tensor, as long as one does not start on the other.
    const bool interleaved = a.key.head_stride != head_bytes || a.key.place_stride != a.kv_heads * a.key.head_stride ||
                             a.key.block_stride != a.index.block_places * a.key.place_stride;
    if (!interleaved || key.begin == value.begin) {
        check_apart(key, value);
    }
    return {qkv, cos_sin, output, key, value};
}

}  // namespace

void check_layout(const AppendArguments &a) {
    check_tokens_and_cache(a, a.tokens, a.qkv_token_stride, {"query", a.query, a.query_head(a.tokens, 0, 0)});
}

void check_layout(const DecodeAttentionArguments &a) {
    const std::int64_t output_bytes =
        std::int64_t{a.rows} * a.kv_heads * a.group * a.head_dim * element_bytes(a.element);
    const std::vector<Range> ranges =
        check_tokens_and_cache(a, a.rows, a.qkv_row_stride, {"output", a.output, a.output + output_bytes});
    check_aligned("workspace", a.workspace, {});
    const auto *const workspace = reinterpret_cast<const char *>(a.workspace);
    const std::int64_t numbers =
        decode_attention_workspace(a.rows, a.kv_heads, a.group, a.head_dim, a.index.capacity);
    for (const Range &range : ranges) {
        check_apart({"workspace", workspace, workspace + numbers * static_cast<std::int64_t>(sizeof(float))}, range);
    }
    for (const auto &[name, cache] : {std::pair{"key_cache", a.key}, std::pair{"value_cache", a.value}}) {
        if (cache.place_stride >= std::int64_t{1} << 31) {  // the kernel multiplies it in 32 bits
            refuse(std::string(name) + " has a stride of " + cache.place_stride +
                   " bytes between places: allowed are less than 2**31");
        }
    }
}

void check_values(const AppendArguments &a) {
    if (a.cu_new[0] != 0) {
        refuse(entry("cu_new", 0, a.cu_new[0]) + ": a running sum of new tokens starts with 0");
    }
    const int used = a.width > 0 ? static_cast<int>(a.tokens / a.width) : a.rows;
    for (int row = 0; row < used; ++row) {
        const std::int64_t count = static_cast<std::int64_t>(a.cu_new[row + 1]) - a.cu_new[row];
        if (count < 0) {
            refuse(entry("cu_new", row + 1, a.cu_new[row + 1]) + " is less than " +
                   entry("cu_new", row, a.cu_new[row]) + ": a running sum cannot fall");
        }
        if (a.width > 0 && count > a.width) {
            refuse(std::string("cu_new gives row ") + row + " " + count + " new tokens, but the batch has width=" +
                   a.width + " columns");
        }
        if (count == 0) {
            continue;
        }
        if (a.start[row] < 0) {
            refuse(entry("start", row, a.start[row]) + ": a row cannot have had fewer than 0 tokens");
        }
        const std::int64_t end = a.start[row] + count;
        const std::string grown = entry("start", row, a.start[row]) + " and " + count + " new tokens make row " + row +
                                  " " + end + " tokens long, but ";
        if (end > a.positions) {
            refuse(grown + "cos_sin has " + a.positions + " positions: compute more");
        }
        if (end > a.index.capacity) {
            refuse(grown + "a row of the cache has room for " + a.index.capacity + ": make the cache longer");
        }
        for (std::int64_t place = a.start[row]; a.index.page_table != nullptr && place < end;) {
            const std::int32_t page = static_cast<std::int32_t>(place / a.index.block_places);
            const std::int32_t block = *a.index.table_entry(row, page);
            if (block < 0 || block >= a.index.blocks) {
                refuse(std::string("page_table[") + row + ", " + page + "]=" + block +
                       ", but the cache has pages 0 to " + (a.index.blocks - 1));
            }
            place = static_cast<std::int64_t>(page + 1) * a.index.block_places;
        }
    }
    if (a.width == 0 && a.cu_new[a.rows] > a.tokens) {
        refuse(entry("cu_new", a.rows, a.cu_new[a.rows]) + ", but qkv has only " + a.tokens + " tokens");
    }
}

void check_values(const ReorderArguments &a) {
    for (int row = 0; row < a.rows; ++row) {
        const std::int64_t source = a.source_rows[row];
        if (source < 0 || source >= a.rows) {
            refuse(entry("source_rows", row, source) + ", but there are rows 0 to " + (a.rows - 1));
        }
        const std::int32_t length = a.lengths[row];
        if (length < 0 || length > a.index.capacity) {
            refuse(entry("lengths", row, length) + ", but a row of the caches has room for 0 to " + a.index.capacity);
        }
        if (a.index.page_table == nullptr || source == row) {
            continue;
        }
        const std::int32_t page = length / a.index.block_places;
        if (length % a.index.block_places == 0) {
            continue;
        }
        for (const std::int32_t owner : {row, static_cast<std::int32_t>(source)}) {
            const std::int32_t block = *a.index.table_entry(owner, page);
            if (block < 0 || block >= a.index.blocks) {
                refuse(std::string("page_table[") + owner + ", " + page + "]=" + block +
                       ", but the caches have pages 0 to " + (a.index.blocks - 1));
            }
        }
    }
}

}  // namespace llama_te
