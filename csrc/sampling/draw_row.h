// How a row's next token is chosen, on the host and on the GPU.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/draw.h"
#include "sampling/noise.h"
#include "sampling/order.h"
#include "sampling/team.h"

namespace llama_te {

// A product that no compiler fuses with an addition, so that every device rounds alike.
LLAMA_TE_HOST_DEVICE inline float rounded_product(float one, float other) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(one, other);
#else
    const volatile float product = one * other;
    return product;
#endif
}

// What changes a row's logits. Tables that the row does not need are null.
struct Adjustment {
    const std::uint32_t *allowed;
    const float *bias;
    const std::uint8_t *seen;
    const std::uint8_t *ending;  // null where the row may end
    const std::int32_t *counts;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    float temperature;  // 1 of a row that takes its likeliest token

    LLAMA_TE_HOST_DEVICE float operator()(float logit, std::int32_t token) const {
        if (allowed != nullptr && (allowed[token / 32] >> (token % 32) & 1U) == 0) {
            return -HUGE_VALF;
        }
        if (bias != nullptr) {
            logit += bias[token];
        }
        if (seen != nullptr && seen[token] != 0) {
            logit = logit < 0 ? rounded_product(logit, repetition_penalty) : logit / repetition_penalty;
        }
        if (ending != nullptr && ending[token] != 0) {
            return -HUGE_VALF;
        }
        if (counts != nullptr) {
            const std::int32_t count = counts[token];
            logit -= rounded_product(frequency_penalty, static_cast<float>(count));
            logit -= count > 0 ? presence_penalty : 0.0F;
        }
        return logit / temperature;
    }
};

// How a row chooses from its logits.
struct Choice {
    bool is_random;
    float top_p;
    float min_p;
    std::int32_t top_k;
    NoiseKey noise;
};

LLAMA_TE_HOST_DEVICE inline Adjustment adjustment_of(const DrawArguments &a, std::int32_t row) {
    const float *const numbers = a.numbers + static_cast<std::int64_t>(row) * kDrawNumbers;
    const std::int64_t *const integers = a.integers + static_cast<std::int64_t>(row) * kDrawIntegers;
    const std::int64_t start = static_cast<std::int64_t>(row) * a.vocabulary;
    const std::int64_t tables = integers[3];
    const bool may_end = a.positions[row] >= integers[2];
    const std::int32_t mask = a.mask_index == nullptr ? -1 : a.mask_index[row];
    Adjustment made;
    made.allowed = mask < 0 || mask >= a.mask_count ? nullptr : a.masks + static_cast<std::int64_t>(mask) * a.mask_words;
    made.bias = a.bias == nullptr || !(tables & kBiased) ? nullptr : a.bias + start;
    made.seen = a.seen == nullptr || !(tables & kMasked) ? nullptr : a.seen + start;
    made.ending = made.seen == nullptr || may_end ? nullptr : a.ending + start;
    made.counts = a.counts == nullptr || !(tables & kCounted) ? nullptr : a.counts + start;
    made.repetition_penalty = numbers[3];
    made.presence_penalty = numbers[4];
    made.frequency_penalty = numbers[5];
    made.temperature = numbers[0] > 0 ? numbers[0] : 1.0F;
    return made;
}

LLAMA_TE_HOST_DEVICE inline Choice choice_of(const DrawArguments &a, std::int32_t row) {
    const float *const numbers = a.numbers + static_cast<std::int64_t>(row) * kDrawNumbers;
    const std::int64_t *const integers = a.integers + static_cast<std::int64_t>(row) * kDrawIntegers;
    const std::int64_t top_k = integers[1] < 1 ? 1 : integers[1];
    Choice made;
    made.is_random = numbers[0] > 0;
    made.top_p = numbers[1];
    made.min_p = numbers[2];
    made.top_k = top_k < a.vocabulary ? static_cast<std::int32_t>(top_k) : a.vocabulary;
    made.noise = noise_key(integers[0], a.positions[row]);
    return made;
}

// Adds a row's token to what the row has written.
LLAMA_TE_HOST_DEVICE inline void record(const DrawArguments &a, std::int32_t row, std::int64_t token) {
    if (token == kNoToken) {
        return;
    }
    const std::int64_t tables = a.integers[static_cast<std::int64_t>(row) * kDrawIntegers + 3];
    const std::int64_t place = static_cast<std::int64_t>(row) * a.vocabulary + token;
    if (a.seen != nullptr && (tables & kMasked)) {
        a.seen[place] = 1;
    }
    if (a.counts != nullptr && (tables & kCounted)) {
        a.counts[place] += 1;
    }
}

// --- top-k -----------------------------------------------------------------------------------------------------------

constexpr float kBucketsOfLogit = 64.0F;  // of a difference of 1 between logits

struct KeyRange {
    std::uint32_t least = 0xffffffffU;
    std::uint32_t greatest = 0;

    LLAMA_TE_HOST_DEVICE void merge(const KeyRange &other) {
        least = other.least < least ? other.least : least;
        greatest = other.greatest > greatest ? other.greatest : greatest;
    }
};

// Returns `ordered` of the k-th greatest logit.
template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE std::uint32_t kth_key(Team &team, const Logits &logit_of, std::int32_t vocabulary, float greatest,
                                           std::int32_t k) {
    // Buckets of one width spread the logits of a model well, and threads that count in one bucket wait for each other.
    const auto bucket_of = [&](std::int32_t token) {
        const float distance = (greatest - logit_of(token)) * kBucketsOfLogit;
        return distance > 0 ? static_cast<int>(distance < kBuckets - 1 ? distance : kBuckets - 1) : 0;
    };
    const Bucket first = team.find(vocabulary, k, bucket_of);
    KeyRange range;
    team.each(vocabulary, [&](std::int32_t token) {
        if (bucket_of(token) == first.bucket) {
            const std::uint32_t key = ordered(logit_of(token));
            range.merge({key, key});
        }
    });
    range = team.all(range);
    k = first.k;
    // Often all logits in a bucket are equal. Otherwise buckets of equally many keys divide the range.
    while (range.least < range.greatest) {
        int shift = 0;
        while ((range.greatest - range.least) >> shift >= kBuckets) {
            ++shift;
        }
        const Bucket found = team.find(vocabulary, k, [&](std::int32_t token) {
            const std::uint32_t key = ordered(logit_of(token));
            const bool is_inside = range.least <= key && key <= range.greatest;
            return is_inside ? static_cast<int>((range.greatest - key) >> shift) : kNoBucket;
        });
        range.greatest -= static_cast<std::uint32_t>(found.bucket) << shift;
        const std::uint32_t width = (1U << shift) - 1;
        range.least = range.greatest - range.least > width ? range.greatest - width : range.least;
        k = found.k;
    }
    return range.least;
}

// --- the choice ------------------------------------------------------------------------------------------------------

// Returns a token's probability divided by that of the likeliest token, as an integer of 2^-32.
LLAMA_TE_HOST_DEVICE inline std::int64_t share_of(float weight) {
    return static_cast<std::int64_t>(weight * 0x1p32F);
}

// Returns the sum of shares that top-p reaches with its last token.
LLAMA_TE_HOST_DEVICE inline std::int64_t top_p_limit(std::int64_t total, float top_p) {
    const double part = top_p > 0 ? static_cast<double>(top_p) : 0.0;
    const auto limit = static_cast<std::int64_t>(ceil(static_cast<double>(total) * part));
    return limit > 1 ? limit : 1;
}

struct Greatest {
    Rank logit = 0;
    Rank sum = 0;  // of logit and noise

    LLAMA_TE_HOST_DEVICE void merge(const Greatest &other) {
        logit = other.logit > logit ? other.logit : logit;
        sum = other.sum > sum ? other.sum : sum;
    }
};

// What a candidate is compared with.
struct Round {
    std::int64_t total = 0;    // shares of the tokens that top-k keeps
    std::int64_t before = 0;   // shares of those before the candidate, in the order of falling logits
    std::int32_t greater = 0;  // their number, without logits that equal the candidate's
    Rank next = 0;             // the greatest sum of logit and noise among them

    LLAMA_TE_HOST_DEVICE void merge(const Round &other) {
        total += other.total;
        before += other.before;
        greater += other.greater;
        next = other.next > next ? other.next : next;
    }
};

// Returns the row's next token.
//
// The Gumbel-max trick draws from the whole vocabulary first. If top-k, top-p and min-p keep that token, it is the one
// that they would let win. If not, they keep no token behind it either, so the draw is repeated among those before it.
// So most rows read their logits twice, and nothing is sorted.
template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE std::int64_t draw_row(Team &team, const Logits &logit_of, const Choice &choice,
                                           std::int32_t vocabulary) {
    Greatest mine;
    {
        Noisiest noisiest(choice.noise);
        team.each(vocabulary, [&](std::int32_t token) {
            const float logit = logit_of(token);
            mine.merge({rank_of(logit, token), 0});
            if (choice.is_random) {
                noisiest.see(token, logit);
            }
        });
        mine.sum = noisiest.rank();
    }
    const Greatest first = team.all(mine);
    if (!choice.is_random || token_of(first.logit) == kNoToken) {
        return token_of(first.logit);
    }
    const bool cuts_k = choice.top_k < vocabulary;
    const bool cuts_p = choice.top_p < 1;
    if (!cuts_k && !cuts_p && !(choice.min_p > 0)) {
        return token_of(first.sum);
    }
    const float greatest = number_of(key_of(first.logit));
    const std::uint32_t least = cuts_k && cuts_p ? kth_key(team, logit_of, vocabulary, greatest, choice.top_k) : 0;
    const auto weight_of = [&](float logit) { return expf(logit - greatest); };
    Rank drawn = first.sum;
    while (token_of(drawn) != kNoToken) {
        const auto candidate = static_cast<std::int32_t>(token_of(drawn));
        const float candidate_logit = logit_of(candidate);
        const Rank candidate_rank = rank_of(candidate_logit, candidate);
        Round part;
        Noisiest noisiest(choice.noise);
        team.each(vocabulary, [&](std::int32_t token) {
            const float logit = logit_of(token);
            const Rank here = rank_of(logit, token);
            if (key_of(here) < least) {
                return;
            }
            const float weight = weight_of(logit);
            const std::int64_t share = share_of(weight);
            part.total += share;
            if (here > candidate_rank) {
                part.before += share;
                part.greater += key_of(here) > key_of(candidate_rank) ? 1 : 0;
                if (weight >= choice.min_p) {
                    noisiest.see(token, logit);
                }
            }
        });
        part.next = noisiest.rank();
        const Round round = team.all(part);
        const bool is_kept = round.greater < choice.top_k && weight_of(candidate_logit) >= choice.min_p &&
                             (!cuts_p || round.before < top_p_limit(round.total, choice.top_p));
        if (is_kept) {
            return candidate;
        }
        drawn = round.next;
    }
    return kNoToken;
}

}  // namespace llama_te
