// Drawing each row's next token by the Gumbel-max trick, from the likely part of the vocabulary.
//
// A token's noise is a hash of its row's seed, its position and its id. Sums of probabilities are integers, so they are
// the same in every order. So a drawn token depends on nothing but its own row.
//
// Shapes: B rows, V vocabulary.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "include/element.h"
#include "include/integer.h"

namespace llama_te {

struct DrawArguments {
    const char *logits;  // [B, V]
    std::int64_t row_bytes;
    ElementType element;
    std::int32_t rows;
    std::int32_t vocabulary;
    const float *numbers;          // [B, 3]: temperature (0 takes the likeliest token), top_p, min_p
    const std::int64_t *integers;  // [B, 3]: seed, top_k (V takes all tokens), the new token's position
    std::int64_t *tokens;          // [B], gets the tokens; kNoToken of a row without a finite greatest logit
};

void draw_cpu(const DrawArguments &arguments);

// --- noise -----------------------------------------------------------------------------------------------------------

// What the noise of a row's tokens depends on.
struct NoiseKey {
    std::uint32_t low;
    std::uint32_t odd;
};

// Mixes a seed and a position by the finalizer of splitmix64. The factors are odd and unrelated, so that neighbouring
// seeds and positions never make the same key.
LLAMA_TE_HOST_DEVICE inline NoiseKey noise_key(std::int64_t seed, std::int64_t position) {
    std::uint64_t key = static_cast<std::uint64_t>(seed) * 0xd1342543de82ef95U +
                        static_cast<std::uint64_t>(position) * 0x9e3779b97f4a7c15U;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9U;
    key = (key ^ (key >> 27)) * 0x94d049bb133111ebU;
    key ^= key >> 31;
    return {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32) | 1U};
}

// Returns 31 random bits of a token.
LLAMA_TE_HOST_DEVICE inline std::uint32_t noise_bits(const NoiseKey &key, std::int32_t token) {
    std::uint32_t hash = static_cast<std::uint32_t>(token) + 1U;
    hash = (hash ^ (hash >> 16)) * 0x7feb352dU;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bU;
    hash ^= hash >> 16;
    hash = (hash ^ key.low) * key.odd;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bU;
    // A shift that copies the sign bit, as PyTorch's does: drawn tokens stay what they are.
    const std::uint32_t copies = hash & 0x80000000U ? 0xffff0000U : 0U;
    return (hash ^ (hash >> 16 | copies)) & 0x7fffffffU;
}

// Returns a number with the standard Gumbel distribution. Of a uniform number u, exponential noise is -log(1 - u), whose
// smallest values win. So u has its full precision near 0.
LLAMA_TE_HOST_DEVICE inline float gumbel(std::uint32_t bits) {
    const float scaled = (static_cast<float>(bits) + 0.5F) * 0x1p-31F;
    const float most = 1.0F - 0x1p-24F;
    const float uniform = scaled < most ? scaled : most;
    return -logf(-log1pf(-uniform));
}

// Returns at least the `gumbel` of these bits, without a logarithm: noise is at most -log(u), and u at least a power of
// two.
LLAMA_TE_HOST_DEVICE inline float gumbel_bound(std::uint32_t bits) {
    const float wide = static_cast<float>(bits) + 0.5F;
    std::uint32_t representation;
    std::memcpy(&representation, &wide, sizeof representation);
    const int exponent = static_cast<int>(representation >> 23) - 127 - 31;  // u is at least 2^exponent
    return static_cast<float>(-exponent) * 0.693148F;                        // just above log(2)
}

// --- order and shares ------------------------------------------------------------------------------------------------

// Returns an integer with the order of float32 numbers other than NaN; -0 and 0 are equal.
LLAMA_TE_HOST_DEVICE inline std::uint32_t ordered(float number) {
    const float positive_zero = number + 0.0F;
    std::uint32_t bits;
    std::memcpy(&bits, &positive_zero, sizeof bits);
    return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

// Returns a token's probability divided by that of the likeliest token, as an integer of 2^-32.
LLAMA_TE_HOST_DEVICE inline std::int64_t share_of(float weight) {
    return static_cast<std::int64_t>(weight * 0x1p32F);
}

// Returns the sum of shares that top-p reaches with its last token.
LLAMA_TE_HOST_DEVICE inline std::int64_t top_p_limit(std::int64_t total, float top_p) {
    return static_cast<std::int64_t>(ceil(static_cast<double>(total) * static_cast<double>(top_p)));
}

}  // namespace llama_te
