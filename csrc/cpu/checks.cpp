// Checks of row numbers, lengths and pages, with messages for the caller. The kernels themselves report nothing.

#include <stdexcept>
#include <string>

#include "cache/append_rope.h"
#include "cache/reorder.h"
#include "cache/widen_pages.h"
#include "cpu/checks.h"
#include "cpu/read_once.h"

namespace llama_te {

namespace {

std::string operator+(const std::string &text, std::int64_t number) {
    return text + std::to_string(number);
}

[[noreturn]] void refuse(const std::string &message) {
    throw std::invalid_argument(message);
}

std::string entry(const char *name, int row, std::int64_t value) {
    return std::string(name) + "[" + row + "]=" + value;
}

}  // namespace

void check_page(const CacheIndex &index, int row, std::int64_t page, const char *table_name) {
    const std::int32_t block = read_once(*index.table_entry(row, static_cast<std::int32_t>(page)));
    if (block < 0 || block >= index.blocks) {
        refuse(std::string(table_name) + "[" + row + ", " + page + "]=" + block + ", but the cache has pages 0 to " +
               (index.blocks - 1));
    }
}

void check_values(const AppendArguments &a) {
    std::int32_t before = read_once(a.cu_new[0]);
    if (before != 0) {
        refuse(entry("cu_new", 0, before) + ": a running sum of new tokens starts with 0");
    }
    const int used = a.width > 0 ? static_cast<int>(a.tokens / a.width) : a.rows;
    for (int row = 0; row < used; ++row) {
        const std::int32_t after = read_once(a.cu_new[row + 1]);
        const std::int64_t count = static_cast<std::int64_t>(after) - before;
        if (count < 0) {
            refuse(entry("cu_new", row + 1, after) + " is less than " + entry("cu_new", row, before) +
                   ": a running sum cannot fall");
        }
        before = after;
        if (a.width > 0 && count > a.width) {
            refuse(std::string("cu_new gives row ") + row + " " + count + " new tokens, but the batch has width=" +
                   a.width + " columns");
        }
        if (count == 0) {
            continue;
        }
        const std::int64_t start = read_once(a.start[row]);
        if (start < 0) {
            refuse(entry("start", row, start) + ": a row cannot have had fewer than 0 tokens");
        }
        const std::int64_t end = start + count;
        const std::string grown = entry("start", row, start) + " and " + count + " new tokens make row " + row + " " +
                                  end + " tokens long, but ";
        if (end > a.positions) {
            refuse(grown + "cos_sin has " + a.positions + " positions: compute more");
        }
        if (end > a.index.capacity) {
            refuse(grown + "a row of the cache has room for " + a.index.capacity + ": make the cache longer");
        }
        for (std::int64_t place = start; a.index.page_table != nullptr && place < end;) {
            const std::int64_t page = place / a.index.block_places;
            check_page(a.index, row, page);
            place = (page + 1) * a.index.block_places;
        }
    }
    if (a.width == 0 && before > a.tokens) {
        refuse(entry("cu_new", a.rows, before) + ", but qkv has only " + a.tokens + " tokens");
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
            check_page(a.index, owner, page);
        }
    }
}

void check_values(const WidenPagesArguments &a) {
    for (int row = 0; row < a.rows; ++row) {
        const std::int32_t length = read_once(a.length[row]);
        if (length < 0 || length > a.index.capacity) {
            refuse(entry("length_B", row, length) + ", but a row of page_table_BP has room for 0 to " +
                   a.index.capacity);
        }
        for (std::int32_t page = 0; page < a.pages_of(length); ++page) {
            check_page(a.index, row, page, "page_table_BP");
        }
    }
}

}  // namespace llama_te
