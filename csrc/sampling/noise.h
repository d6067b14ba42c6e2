// The noise of tokens: a hash of a row's seed, the token's position and its id.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/order.h"

namespace llama_te {

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
    const int exponent = static_cast<int>(float_bits(static_cast<float>(bits) + 0.5F) >> 23) - 127 - 31;
    return static_cast<float>(-exponent) * 0.693148F;  // u is at least 2^exponent; the factor is just above log(2)
}

// The token with the greatest sum of logit and noise, of those that one thread has seen.
class Noisiest {
public:
    LLAMA_TE_HOST_DEVICE explicit Noisiest(const NoiseKey &key) : key_(key) {
    }

    LLAMA_TE_HOST_DEVICE void see(std::int32_t token, float logit) {
        const std::uint32_t bits = noise_bits(key_, token);
        // Few tokens can win, and the others need no logarithm. The bound's own rounding is less than the margin.
        if (logit + gumbel_bound(bits) + 1e-3F < reached_) {
            return;
        }
        const float sum = logit + gumbel(bits);
        if (sum > sum_) {  // a thread sees the lower token first
            sum_ = sum;
            token_ = token;
            reached_ = sum > reached_ ? sum : reached_;
        }
    }

    // Learns what other threads have reached. Otherwise in most steps one of the threads that run in step would need
    // logarithms, and the others would wait.
    template <typename Team>
    LLAMA_TE_HOST_DEVICE void learn(const Team &team) {
        reached_ = team.greatest_nearby(reached_);
    }

    // 0 if it has seen no token above -inf.
    LLAMA_TE_HOST_DEVICE Rank rank() const {
        return token_ < 0 ? 0 : rank_of(sum_, token_);
    }

private:
    NoiseKey key_;
    float sum_ = -HUGE_VALF;
    float reached_ = -HUGE_VALF;  // a sum of this thread or of another one
    std::int32_t token_ = -1;
};

}  // namespace llama_te
