// Beam search's reordering of caches: arguments, limits, the moves of each row, and entry points.

#pragma once

#include <cstdint>

#include "include/cache.h"

namespace llama_te {

// Rows that a reorder can exchange, and caches that it takes: two for each of 240 layers, or with FP8 and its scales four
// for each of 120. The caches' addresses travel in the kernel's parameters (4 KiB at most), so a captured graph needs no
// table of them in device memory.
constexpr int kMaxReorderRows = 64;
constexpr int kMaxCaches = 480;

// The source of each row, int32 or int64, as the caller has them.
struct SourceRows {
    const void *data;
    bool wide;

    LLAMA_TE_HOST_DEVICE std::int64_t operator[](int row) const {
        return wide ? static_cast<const std::int64_t *>(data)[row] : static_cast<const std::int32_t *>(data)[row];
    }
};

struct ReorderArguments {
    char *caches[kMaxCaches];  // then the scales of FP8 caches
    std::int32_t cache_count;  // without the scales
    std::int32_t scale_count;
    std::int32_t rows;  // B
    SourceRows source_rows;
    const std::int32_t *lengths;
    std::int64_t block_bytes;  // of a row or a page
    std::int64_t place_bytes;
    std::int64_t scale_bytes;  // of a page's scales
    CacheIndex index;         // its page_table is null for contiguous caches
    std::int32_t *semaphore;  // GPU and pages only, see reorder.cu

    LLAMA_TE_HOST_DEVICE std::int32_t *table_entry(std::int32_t row, std::int32_t page) const {
        return const_cast<std::int32_t *>(index.table_entry(row, page));
    }
};

// A copy of `bytes` bytes within one cache or within the page table. `to` and `from` are offsets.
struct Move {
    std::int64_t to;
    std::int64_t from;
    std::int64_t bytes;
};

// The move of row `row` of contiguous caches; returns false if there is none.
LLAMA_TE_HOST_DEVICE inline bool row_move(const ReorderArguments &a, int row, Move &move) {
    const std::int64_t source = a.source_rows[row];
    const std::int32_t length = a.lengths[row];
    if (source == row || source < 0 || source >= a.rows || length <= 0 || length > a.index.capacity) {
        return false;
    }
    move = {row * a.block_bytes, source * a.block_bytes, length * a.place_bytes};
    return true;
}

// The move within the page table for row `row`: the entries of its source's full pages.
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

// The last, partly filled page of row `row`, and its source's, whose tokens it gets; returns false if there is none.
struct LastPage {
    std::int32_t to;
    std::int32_t from;
    std::int32_t places;
};

LLAMA_TE_HOST_DEVICE inline bool find_last_page(const ReorderArguments &a, int row, LastPage &last) {
    const std::int64_t source = a.source_rows[row];
    const std::int32_t length = a.lengths[row];
    if (source == row || source < 0 || source >= a.rows || length <= 0 || length > a.index.capacity) {
        return false;
    }
    const std::int32_t page = length / a.index.block_places;
    const std::int32_t places = length - page * a.index.block_places;
    if (places == 0) {
        return false;  // all pages are full, and the table may have no entry behind them
    }
    last = {*a.table_entry(row, page), *a.table_entry(static_cast<std::int32_t>(source), page), places};
    return last.to != last.from && last.to >= 0 && last.to < a.index.blocks && last.from >= 0 &&
           last.from < a.index.blocks;
}

// The move of that page's tokens.
LLAMA_TE_HOST_DEVICE inline bool page_move(const ReorderArguments &a, int row, Move &move) {
    LastPage last;
    if (!find_last_page(a, row, last)) {
        return false;
    }
    move = {last.to * a.block_bytes, last.from * a.block_bytes, last.places * a.place_bytes};
    return true;
}

// The move of that page's scales. A head's scales lie side by side, so those of unused places move along.
LLAMA_TE_HOST_DEVICE inline bool scale_move(const ReorderArguments &a, int row, Move &move) {
    LastPage last;
    if (!find_last_page(a, row, last)) {
        return false;
    }
    move = {last.to * a.scale_bytes, last.from * a.scale_bytes, a.scale_bytes};
    return true;
}

// Checks the values in `source_rows`, `lengths` and the page table, which must be in host memory; the caches need not
// be. Throws std::invalid_argument.
void check_values(const ReorderArguments &arguments);

// These check the values before they write anything.
void reorder_rows_cpu(const ReorderArguments &arguments);
void reorder_pages_cpu(const ReorderArguments &arguments);

// These check nothing and do not wait for the GPU. `stream` is a cudaStream_t of `device`. They throw
// std::runtime_error where the launch fails. A build without CUDA does not have them.
void reorder_rows_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream);
void reorder_pages_cuda(const ReorderArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
