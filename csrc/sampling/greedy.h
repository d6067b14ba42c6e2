// Greedy sampling: each row's likeliest token.
//
// Shapes: B rows, V vocabulary.

#pragma once

#include <cstdint>

#include "sampling/order.h"

namespace llama_te {

struct GreedyArguments {
    const char *logits;  // bfloat16 [B, V]
    std::int64_t row_stride;
    std::int32_t rows;
    std::int32_t vocabulary;   // a multiple of 8
    std::int64_t *tokens;      // [B], gets the likeliest token, the lowest of equal ones, or kNoToken
    std::int32_t *lengths;     // [B], or null; 1 is added to every length but 0
    std::uint64_t *best;       // [B], 0 before and after
    std::int32_t *semaphores;  // [B], 0 before and after
};

void greedy_cuda(const GreedyArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
