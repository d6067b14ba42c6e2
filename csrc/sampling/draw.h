// Choosing each row's next token by the Gumbel-max trick, from the likely part of the vocabulary.
//
// Shapes: B rows of the batch, R rows of the tables, V vocabulary, M masks of W words.

#pragma once

#include <cstdint>

#include "include/element.h"

namespace llama_te {

// The columns of `numbers` and of `integers`.
constexpr int kDrawNumbers = 6;   // temperature (0 takes the likeliest token), top_p, min_p, and the penalties:
                                  // repetition, presence, frequency
constexpr int kDrawIntegers = 4;  // seed, top_k (V takes all tokens), min_length, the tables that count (below)

// Which tables a row's logits need. Entries of others do not count.
constexpr int kBiased = 1;
constexpr int kMasked = 2;
constexpr int kCounted = 4;

struct DrawArguments {
    const char *logits;  // [B, V]
    std::int64_t row_bytes;
    ElementType element;
    std::int32_t rows;
    std::int32_t vocabulary;
    const float *numbers;            // [R, 6]
    const std::int64_t *integers;    // [R, 4]
    const std::int32_t *positions;   // [B], of the new tokens
    const float *bias;               // [R, V] or null
    std::uint8_t *seen;              // [R, V] or null, gets the tokens
    const std::uint8_t *ending;      // [R, V], null where `seen` is
    std::int32_t *counts;            // [R, V] or null, gets the tokens
    const std::int32_t *mask_index;  // [B] or null: a row's mask, or -1
    const std::uint32_t *masks;      // [M, W]
    std::int32_t mask_count;
    std::int32_t mask_words;
    std::int64_t *tokens;  // [B], gets the tokens; kNoToken of a row without a finite greatest logit
};

void draw_cpu(const DrawArguments &arguments);
void draw_cuda(const DrawArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
