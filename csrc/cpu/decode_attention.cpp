// The part of decode_attention that C++ does for the CPU: rotation and append. PyTorch attends.

#include "attention/decode_attention.h"

#include <numeric>
#include <vector>

#include "cache/append_rope.h"
#include "cpu/checks.h"
#include "cpu/read_once.h"

namespace llama_te {

namespace {

// Runs a function of append_rope for one new token in each row.
void for_one_token_each(const DecodeAttentionArguments &a, void (*run)(const AppendArguments &)) {
    std::vector<std::int32_t> cu_new(static_cast<std::size_t>(a.rows) + 1);
    std::iota(cu_new.begin(), cu_new.end(), 0);
    run({a.element, a.qkv, a.qkv_row_stride, a.rows, 1, a.kv_heads, a.group, a.head_dim, a.cos_sin, a.cos_sin_stride,
         a.positions, cu_new.data(), a.start, a.rows, a.index, a.output, a.key, a.value, a.key_scale, a.value_scale});
}

}  // namespace

void check_values(const DecodeAttentionArguments &arguments) {
    for_one_token_each(arguments, check_values);
    if (arguments.index.page_table == nullptr) {
        return;
    }
    // Attention also reads the pages of earlier tokens.
    for (int row = 0; row < arguments.rows; ++row) {
        const std::int32_t earlier = read_once(arguments.start[row]) / arguments.index.block_places;
        for (std::int32_t page = 0; page < earlier; ++page) {
            check_page(arguments.index, row, page);
        }
    }
}

void decode_attention_append_cpu(const DecodeAttentionArguments &arguments) {
    check_values(arguments);
    for_one_token_each(arguments, append_rope_cpu);
}

}  // namespace llama_te
