// The operators' arguments, the address computation that the CPU's and the GPU's code share, and their entry points.
//
// Pointers are raw and all strides are in bytes, so that nothing here knows torch, and so that moving keys and values
// about needs no element type. A cache is made of blocks of places: a block is a row of a contiguous cache
// [R, L, K, D] or a page of a paged one [pages, page_size, K, D], and a place holds one token's K heads of D elements.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LLAMA_TE_HOST_DEVICE __host__ __device__
#else
#define LLAMA_TE_HOST_DEVICE
#endif

namespace llama_te {

enum class ElementType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

constexpr int element_bytes(ElementType element) {
    return element == ElementType::kFloat32 ? 4 : 2;
}

// Vectorized accesses are this wide: the widest that one thread can do.
constexpr int kVectorBytes = 16;

// Rows that a reorder can exchange, and caches that it takes: 2 of each of 128 layers. The caches' addresses travel in
// the kernel's parameters (4 KiB at most), so that a captured graph needs no table of them in device memory.
// Heads that append_rope takes: half of one is whole vectors of 2-byte elements.
constexpr int kHeadDimMultiple = 16;
constexpr int kMaxHeadDim = 256;

constexpr int kMaxReorderRows = 64;
constexpr int kMaxCaches = 256;

struct CacheMemory {
    char *data;
    std::int64_t block_stride;
    std::int64_t place_stride;
    std::int64_t head_stride;

    LLAMA_TE_HOST_DEVICE char *at(std::int64_t block, std::int64_t place) const {
        return data + block * block_stride + place * place_stride;
    }
};

// Which block, and which place there, the place of a row is.
struct CacheIndex {
    const std::int32_t *page_table;  // [R, pages per row], or null: block r is row r
    std::int64_t page_table_stride;
    std::int32_t capacity;      // places of a row
    std::int32_t blocks;        // of the whole cache
    std::int32_t block_places;  // of one block

    // False where the row has no such place or the table names no such page. The kernels then leave the token out, at
    // the cost of two comparisons: they never write outside of the cache, whatever the device's memory says.
    LLAMA_TE_HOST_DEVICE bool find(std::int32_t row, std::int32_t place, std::int32_t &block,
                                   std::int32_t &block_place) const {
        block = row;
        block_place = place;
        if (place < 0 || place >= capacity) {
            return false;
        }
        if (page_table != nullptr) {
            const std::int32_t page = place / block_places;
            block = *table_entry(row, page);
            block_place = place - page * block_places;
        }
        return block >= 0 && block < blocks;
    }

    LLAMA_TE_HOST_DEVICE const std::int32_t *table_entry(std::int32_t row, std::int32_t page) const {
        return reinterpret_cast<const std::int32_t *>(reinterpret_cast<const char *>(page_table) +
                                                      row * page_table_stride) +
               page;
    }
};

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

    LLAMA_TE_HOST_DEVICE int head_bytes() const {
        return head_dim * (element == ElementType::kFloat32 ? 4 : 2);
    }
    // Heads of one token's qkv.
    LLAMA_TE_HOST_DEVICE int heads() const {
        return kv_heads * (group + 2);
    }
    LLAMA_TE_HOST_DEVICE char *query_head(std::int64_t token, int kv_head, int head_of_group) const {
        return query + ((token * kv_heads + kv_head) * group + head_of_group) * head_bytes();
    }
};

// The rows' sources are int32 or int64, as the caller has them.
struct SourceRows {
    const void *data;
    bool wide;

    LLAMA_TE_HOST_DEVICE std::int64_t operator[](int row) const {
        return wide ? static_cast<const std::int64_t *>(data)[row] : static_cast<const std::int32_t *>(data)[row];
    }
};

struct ReorderArguments {
    char *caches[kMaxCaches];
    std::int32_t cache_count;
    std::int32_t rows;  // B
    SourceRows source_rows;
    const std::int32_t *lengths;
    std::int64_t block_bytes;  // of a row or a page
    std::int64_t place_bytes;
    CacheIndex index;      // its page_table is null for contiguous caches
    std::int32_t *ticket;  // GPU and pages only, see reorder.cu

    LLAMA_TE_HOST_DEVICE std::int32_t *table_entry(std::int32_t row, std::int32_t page) const {
        return const_cast<std::int32_t *>(index.table_entry(row, page));
    }
};

// `to` becomes what `from` was in its first `bytes` bytes; both are offsets.
struct Move {
    std::int64_t to;
    std::int64_t from;
    std::int64_t bytes;
};

// What row `row` of contiguous caches needs; false: nothing.
LLAMA_TE_HOST_DEVICE inline bool row_move(const ReorderArguments &a, int row, Move &move) {
    const std::int64_t source = a.source_rows[row];
    const std::int32_t length = a.lengths[row];
    if (source == row || source < 0 || source >= a.rows || length <= 0 || length > a.index.capacity) {
        return false;
    }
    move = {row * a.block_bytes, source * a.block_bytes, length * a.place_bytes};
    return true;
}

// What the page table of row `row` needs: the entries of its source's full pages.
LLAMA_TE_HOST_DEVICE inline bool table_move(const ReorderArguments &a, int row, Move &move) {
    const std::int64_t source = a.source_rows[row];
    const std::int32_t length = a.lengths[row];
    if (source == row || source < 0 || source >= a.rows || length < a.index.block_places ||
        length > a.index.capacity) {
        return false;
    }
    const std::int64_t bytes = length / a.index.block_places * static_cast<std::int64_t>(sizeof(std::int32_t));
    move = {row * a.index.page_table_stride, source * a.index.page_table_stride, bytes};
    return true;
}

// What the last, partly filled page of row `row` needs: the tokens of its source's.
LLAMA_TE_HOST_DEVICE inline bool page_move(const ReorderArguments &a, int row, Move &move) {
    const std::int64_t source = a.source_rows[row];
    const std::int32_t length = a.lengths[row];
    if (source == row || source < 0 || source >= a.rows || length <= 0 || length > a.index.capacity) {
        return false;
    }
    const std::int32_t page = length / a.index.block_places;
    const std::int32_t places = length - page * a.index.block_places;
    if (places == 0) {
        return false;  // and the table may have no such entry
    }
    const std::int32_t to = *a.table_entry(row, page);
    const std::int32_t from = *a.table_entry(static_cast<std::int32_t>(source), page);
    if (to == from || to < 0 || to >= a.index.blocks || from < 0 || from >= a.index.blocks) {
        return false;
    }
    move = {to * a.block_bytes, from * a.block_bytes, places * a.place_bytes};
    return true;
}

// What the host can tell without reading the arguments' arrays: alignment and overlap. Throws std::invalid_argument.
void check_layout(const AppendArguments &arguments);

// The same for what the arrays say; they must be in the host's memory, the caches need not.
void check_values(const AppendArguments &arguments);
void check_values(const ReorderArguments &arguments);

// These check everything before they write anything.
void append_rope_cpu(const AppendArguments &arguments);
void reorder_rows_cpu(const ReorderArguments &arguments);
void reorder_pages_cpu(const ReorderArguments &arguments);

// These check the layout alone and do not wait for the GPU. `stream` is a cudaStream_t of `device`. A launch that
// fails throws std::runtime_error. A build without CUDA does not have them.
void append_rope_cuda(const AppendArguments &arguments, int device, std::uintptr_t stream);
void reorder_rows_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream);
void reorder_pages_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
