// Log-probabilities of chosen tokens and of the likeliest ones.
//
// Shapes: B rows, V vocabulary, K likeliest tokens.

#pragma once

#include <cstdint>

#include "include/element.h"

namespace llama_te {

struct LogprobsArguments {
    const char *logits;  // [B, V]
    std::int64_t row_bytes;
    ElementType element;
    std::int32_t rows;
    std::int32_t vocabulary;
    std::int32_t likeliest;      // K, at most V
    const std::int64_t *tokens;  // [B]
    float *logprobs;             // [B], NaN of a token outside the vocabulary
    float *top_logprobs;         // [B, K], falling; NaN of a row without a finite greatest logit, as `logprobs`
    std::int64_t *top_tokens;    // [B, K], the lower token first of equal logits
};

void logprobs_cpu(const LogprobsArguments &arguments);
void logprobs_cuda(const LogprobsArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
