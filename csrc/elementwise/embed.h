// Rows of the embedding for tokens.
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
    std::int64_t row_bytes;  // of E, a multiple of kVectorBytes
};

void embed_cuda(const EmbedArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
