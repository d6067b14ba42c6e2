// The noise of tokens: a hash of a row's seed, the token's position and its id.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/order.h"
#include "sampling/run.h"

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

// The first step of `noise_bits`, of the number after a token.
LLAMA_TE_HOST_DEVICE inline std::uint32_t folded(std::int32_t number) {
    const auto bits = static_cast<std::uint32_t>(number);
    return bits ^ (bits >> 16);
}

// Returns 31 random bits of a token, of its `folded` successor.
LLAMA_TE_HOST_DEVICE inline std::uint32_t noise_bits(const NoiseKey &key, std::uint32_t folded_successor) {
    std::uint32_t hash = folded_successor * 0x7feb352dU;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bU;
    hash ^= hash >> 16;
    hash = (hash ^ key.low) * key.odd;
    hash = (hash ^ (hash >> 15)) * 0x846ca68bU;
    // A shift that copies the sign bit, as PyTorch's does: drawn tokens stay what they are.
    const auto shifted = static_cast<std::uint32_t>(static_cast<std::int32_t>(hash) >> 16);
    return (hash ^ shifted) & 0x7fffffffU;
}

// Returns a number with the standard Gumbel distribution. Of a uniform number u, exponential noise is -log(1 - u), whose
// smallest values win. So u has its full precision near 0.
LLAMA_TE_HOST_DEVICE inline float gumbel(std::uint32_t bits) {
    const float scaled = (static_cast<float>(bits) + 0.5F) * 0x1p-31F;
    const float most = 1.0F - 0x1p-24F;
    const float uniform = scaled < most ? scaled : most;
    return -logf(-log1pf(-uniform));
}

constexpr float kMostGumbel = 22.2F;  // above every `gumbel`

// Returns at least the `gumbel` of these bits, without a logarithm: noise is at most -log(u). As integers, the bits of a
// float32 number are a function that is nowhere above its log2. The last term is more than all roundings.
LLAMA_TE_HOST_DEVICE inline float gumbel_bound(std::uint32_t bits) {
    constexpr float kLog2 = 0.693147181F;
    const auto log2_bits = static_cast<float>(static_cast<std::int32_t>(float_bits(static_cast<float>(bits))));
    return log2_bits * (-kLog2 * 0x1p-23F) + (kLog2 * (127 + 31) + 1e-3F);
}

// The token with the greatest sum of logit and noise, of those that one thread has seen.
class Noisiest {
public:
    LLAMA_TE_HOST_DEVICE explicit Noisiest(const NoiseKey &key) : key_(key) {
    }

    // Sees the tokens of a run that may_win(token, logit). Few can reach the sum of another token, and the others need
    // neither a logarithm nor that question.
    template <typename MayWin>
    LLAMA_TE_HOST_DEVICE void see(const Run &run, const MayWin &may_win) {
        if (run.greatest() + kMostGumbel < reached_) {
            return;
        }
        // The successors of all tokens but the last one differ from the first token in their lowest bits alone.
        const std::uint32_t first = folded(run.first);
        std::uint32_t candidates = 0;  // a bit of each token
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int i = 0; i < kRun; ++i) {
            const std::uint32_t successor =
                i + 1 < kRun ? first ^ static_cast<std::uint32_t>(i + 1) : folded(run.first + kRun);
            candidates |= can_reach(run.logits[i], noise_bits(key_, successor)) ? 1U << i : 0U;
        }
        // In one loop the threads that run in step look at their candidates together, wherever those are in their runs.
        while (candidates != 0) {
            const int place = lowest_bit(candidates);
            candidates &= candidates - 1;
            see_one(run.first + place, run.logit(place), may_win);
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
    LLAMA_TE_HOST_DEVICE bool can_reach(float logit, std::uint32_t bits) const {
        return !(logit + gumbel_bound(bits) < reached_);
    }

    template <typename MayWin>
    LLAMA_TE_HOST_DEVICE void see_one(std::int32_t token, float logit, const MayWin &may_win) {
        const std::uint32_t bits = noise_bits(key_, folded(token + 1));
        // The tokens before it in the run may have reached more.
        if (!can_reach(logit, bits) || !may_win(token, logit)) {
            return;
        }
        const float sum = logit + gumbel(bits);
        if (sum > sum_) {  // a thread sees the lower token first; -inf past the end of the vocabulary never gets here
            sum_ = sum;
            token_ = token;
            reached_ = sum > reached_ ? sum : reached_;
        }
    }

    NoiseKey key_;
    float sum_ = -HUGE_VALF;
    float reached_ = -HUGE_VALF;  // a sum of this thread or of another one
    std::int32_t token_ = -1;
};

}  // namespace llama_te
