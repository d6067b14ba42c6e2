// A check that several operators share.

#pragma once

#include <cstdint>

#include "include/cache.h"

namespace llama_te {

// Checks that the cache has the page in a row's entry of the page table, which the caller names so. Throws
// std::invalid_argument.
void check_page(const CacheIndex &index, int row, std::int64_t page, const char *table_name = "page_table");

}  // namespace llama_te
