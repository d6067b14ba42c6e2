// The two ends of a decoding step: tokens become rows of the embedding, logits become tokens.
//
// Shapes: B rows, V vocabulary, E hidden size.

#pragma once

#include <cstdint>

namespace llama_te {

struct EmbedArguments {
    const std::int64_t *tokens;  // [B]
    const char *table;           // [V, E]
    char *output;                // [B, E]
    std::int32_t rows;
    std::int64_t vocabulary;
    std::int64_t row_bytes;  // of E, a multiple of 16
};

struct GreedyArguments {
    const char *logits;  // bfloat16 [B, V]
    std::int64_t row_stride;
    std::int32_t rows;
    std::int32_t vocabulary;  // a multiple of 8
    std::int64_t *tokens;     // [B], gets the likeliest; the lowest of equal ones
    std::int32_t *lengths;    // [B], or null; 1 is added to those that are not 0
    std::uint64_t *best;      // [B], 0 before and after
    std::int32_t *tickets;    // [B], likewise
};

void embed_cuda(const EmbedArguments &arguments, int device, std::uintptr_t stream);
void greedy_cuda(const GreedyArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
