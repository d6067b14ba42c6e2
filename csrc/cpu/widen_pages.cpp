// widen_pages on the CPU: plain loops.

#include "cache/widen_pages.h"
#include "cpu/numbers.h"
#include "cpu/read_once.h"
#include "include/e4m3.h"

namespace llama_te {

namespace {

void widen_page(const WidenPagesArguments &a, std::int32_t block, BFloat16 *to) {
    for (std::int32_t place = 0; place < a.index.block_places; ++place) {
        for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
            const E4M3 *from = reinterpret_cast<const E4M3 *>(a.source.at(block, place) + kv_head * a.source.head_stride);
            const double factor = float_of(bits_of_scale(*a.scale.at(block, kv_head, place)));
            for (int i = 0; i < a.head_dim; ++i) {
                (to++)->set(from[i].get() * factor);
            }
        }
    }
}

}  // namespace

void widen_pages_cpu(const WidenPagesArguments &arguments) {
    check_values(arguments);
    const WidenPagesArguments &a = arguments;
    for (std::int32_t row = 0; row < a.rows; ++row) {
        const std::int32_t pages = a.pages_of(read_once(a.length[row]));
        for (std::int32_t page = 0; page < pages; ++page) {
            // check_values has run, but another thread may have written the table since then: never leave the cache.
            const std::int32_t block = read_once(*a.index.table_entry(row, page));
            if (block >= 0 && block < a.index.blocks) {
                const std::int64_t to = (static_cast<std::int64_t>(row) * a.pages_per_row + page) * a.page_elements();
                widen_page(a, block, reinterpret_cast<BFloat16 *>(a.target) + to);
            }
        }
    }
}

}  // namespace llama_te
