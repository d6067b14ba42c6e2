// The geometry of a key/value cache, shared by CPU and GPU code.
//
// Pointers are raw and strides are in bytes, so that this code needs no torch, and so that moving keys and values needs
// no element type. A cache consists of blocks of places: a block is a row of a contiguous cache [R, L, K, D] or a page
// of a paged one [pages, page size, K, D], and a place holds one token's K heads of D elements.

#pragma once

#include <cstdint>

#include "element.h"

namespace llama_te {

// The keys or the values of one layer.
struct CacheMemory {
    char *data;
    std::int64_t block_stride;
    std::int64_t place_stride;
    std::int64_t head_stride;

    LLAMA_TE_HOST_DEVICE char *at(std::int64_t block, std::int64_t place) const {
        return data + block * block_stride + place * place_stride;
    }
};

// The scales of an FP8 cache's keys or values, [pages, K, page size]: the scales of a head's neighbouring tokens lie side
// by side. Caches of other types have none, and `data` is null.
struct CacheScales {
    std::uint8_t *data;
    std::int64_t block_stride;
    std::int64_t head_stride;

    LLAMA_TE_HOST_DEVICE std::uint8_t *at(std::int64_t block, std::int64_t head, std::int64_t place) const {
        return data + block * block_stride + head * head_stride + place;
    }
};

// Finds the block, and the place within it, that holds a place of a row.
struct CacheIndex {
    const std::int32_t *page_table;  // [R, pages per row], or null: block r is row r
    std::int64_t page_table_stride;
    std::int32_t capacity;      // places of a row
    std::int32_t blocks;        // of the whole cache
    std::int32_t block_places;  // of one block

    // Returns false where the row has no such place or the table names no page of the cache. Kernels then leave the
    // token out, at the cost of two comparisons: they never write outside of the cache, whatever device memory says.
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

}  // namespace llama_te
