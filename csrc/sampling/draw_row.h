// How a row's next token is chosen, on the host and on the GPU.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/draw.h"
#include "sampling/fixed_sum.h"
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
    // What the tables have for a token.
    struct Entry {
        float bias;
        std::int32_t count;
        bool is_seen;
        bool is_forbidden;
    };

    const std::uint32_t *allowed;
    const float *bias;
    const std::uint8_t *seen;
    const std::uint8_t *ending;  // null where the row may end
    const std::int32_t *counts;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    float scale;  // 1 over the temperature; 1 of a row that takes its likeliest token

    // Whether the row needs no table.
    LLAMA_TE_HOST_DEVICE bool only_scales() const {
        return allowed == nullptr && bias == nullptr && seen == nullptr && counts == nullptr;
    }

    LLAMA_TE_HOST_DEVICE Entry read(std::int32_t token) const {
        Entry entry;
        entry.bias = bias == nullptr ? 0.0F : bias[token];
        entry.count = counts == nullptr ? 0 : counts[token];
        entry.is_seen = seen != nullptr && seen[token] != 0;
        // All tables are read before any value is used.
        const std::uint32_t allowed_tokens = allowed == nullptr ? 0xffffffffU : allowed[token / 32];
        const std::uint32_t is_ending = ending == nullptr ? 0 : ending[token];
        entry.is_forbidden = ((~allowed_tokens >> (token % 32) & 1U) | is_ending) != 0;
        return entry;
    }

    LLAMA_TE_HOST_DEVICE float operator()(float logit, const Entry &entry) const {
        logit += entry.bias;
        if (entry.is_seen) {
            logit = logit < 0 ? rounded_product(logit, repetition_penalty) : logit / repetition_penalty;
        }
        if (entry.count != 0) {
            logit -= rounded_product(frequency_penalty, static_cast<float>(entry.count));
            logit -= entry.count > 0 ? presence_penalty : 0.0F;
        }
        return entry.is_forbidden ? -HUGE_VALF : rounded_product(logit, scale);
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
    made.scale = numbers[0] > 0 ? 1.0F / numbers[0] : 1.0F;
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

struct KeyRange {
    std::uint32_t least = 0xffffffffU;
    std::uint32_t greatest = 0;

    LLAMA_TE_HOST_DEVICE void merge(const KeyRange &other) {
        least = other.least < least ? other.least : least;
        greatest = other.greatest > greatest ? other.greatest : greatest;
    }
};

// Divides a range of keys into buckets of equally many.
struct KeyBuckets {
    KeyRange range;
    int shift = 0;
    float least;  // of the range

    LLAMA_TE_HOST_DEVICE explicit KeyBuckets(const KeyRange &keys) : range(keys), least(number_of(keys.least)) {
        while ((range.greatest - range.least) >> shift >= kBuckets) {
            ++shift;
        }
    }

    LLAMA_TE_HOST_DEVICE int operator()(float logit) const {
        const std::uint32_t key = ordered(logit);
        const bool is_inside = range.least <= key && key <= range.greatest;
        return is_inside ? static_cast<int>((range.greatest - key) >> shift) : kNoBucket;
    }
};

// Returns the k-th greatest logit. `own` is the greatest one of the thread.
template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE float kth_logit(Team &team, const Logits &logits, std::int32_t vocabulary, float greatest,
                                     float own, std::int32_t k) {
    LogitBuckets bucket_of{greatest};
    bucket_of.least = team.least_of(k, own, bucket_of);
    const Bucket first = team.find(vocabulary, k, logits, bucket_of);
    KeyRange range;
    team.each(vocabulary, logits, [&](const Run &run) {
        if (!first.reaches(bucket_of(run.greatest()))) {
            return;
        }
        for (const float logit : run.logits) {
            if (bucket_of(logit) == first.bucket) {
                const std::uint32_t key = ordered(logit);
                range.merge({key, key});
            }
        }
    });
    range = team.all(range);
    k = first.k;
    // Often all logits in a bucket are equal.
    while (range.least < range.greatest) {
        const KeyBuckets buckets(range);
        const Bucket found = team.find(vocabulary, k, logits, buckets);
        range.greatest -= static_cast<std::uint32_t>(found.bucket) << buckets.shift;
        const std::uint32_t width = (1U << buckets.shift) - 1;
        range.least = range.greatest - range.least > width ? range.greatest - width : range.least;
        k = found.k;
    }
    return number_of(range.least);
}

// --- the choice ------------------------------------------------------------------------------------------------------

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

// Sums of shares: of tokens' probabilities divided by that of the likeliest token.
struct Shares {
    FixedSum<32> total;   // of the tokens that top-k keeps
    FixedSum<32> before;  // of those before the candidate, in the order of falling logits

    LLAMA_TE_HOST_DEVICE void merge(const Shares &other) {
        total.merge(other.total);
        before.merge(other.before);
    }
};

// Returns the row's next token.
//
// The Gumbel-max trick draws from the whole vocabulary first. If top-k, top-p and min-p keep that token, it is the one
// that they would let win. If not, they keep no token behind it either, so the draw is repeated among those before it.
// So with top-p most rows read their logits twice, and nothing is sorted. The logits that top-k and min-p keep are
// known in advance: without top-p a second draw is the last one.
template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE std::int64_t draw_row(Team &team, const Logits &logits, const Choice &choice,
                                           std::int32_t vocabulary) {
    Greatest mine;
    Best best;
    {
        Noisiest noisiest(choice.noise);
        const auto see = [&](const Run &run) {
            best.see(run);
            if (choice.is_random) {
                noisiest.see(run, [](std::int32_t, float) { return true; });
            }
        };
        const auto learn = [&] {
            if (choice.is_random) {
                noisiest.learn(team);
            }
        };
        team.each(vocabulary, logits, see, learn);
        mine = {best.rank(), noisiest.rank()};
    }
    const Greatest first = team.all(mine);
    if (!choice.is_random || token_of(first.logit) == kNoToken) {
        return token_of(first.logit);
    }
    const bool cuts_k = choice.top_k < vocabulary;
    const bool cuts_p = choice.top_p < 1;
    const float greatest = number_of(key_of(first.logit));
    const float least = cuts_k ? kth_logit(team, logits, vocabulary, greatest, best.logit(), choice.top_k) : -HUGE_VALF;
    const auto weight_of = [&](float logit) { return expf(logit - greatest); };
    const auto may_win = [&](float logit) { return logit >= least && weight_of(logit) >= choice.min_p; };
    // Below these logits all shares are 0, and no token may win. The margin is more than all roundings.
    const float least_share = fmaxf(least, greatest - 23.0F);
    const float least_winner = fmaxf(least, greatest + logf(choice.min_p) - 1e-3F);
    Rank drawn = first.sum;
    while (token_of(drawn) != kNoToken) {
        const auto candidate = static_cast<std::int32_t>(token_of(drawn));
        const float limit = logits.at(candidate);
        const auto is_before = [&](std::int32_t token, float logit) {
            return token < candidate ? logit >= limit : logit > limit;
        };
        const auto top_p_keeps_it = [&] {
            Shares part;
            team.each(vocabulary, logits, [&](const Run &run) {
                if (run.greatest() < least_share) {
                    return;
                }
                float shares[kRun];
                for (int i = 0; i < kRun; ++i) {
                    shares[i] = weight_of(run.logits[i] < least ? -HUGE_VALF : run.logits[i]);
                }
                part.total.add(shares);
                if (run.greatest() < limit) {
                    return;
                }
                for (int i = 0; i < kRun; ++i) {
                    shares[i] = is_before(run.first + i, run.logits[i]) ? shares[i] : 0.0F;
                }
                part.before.add(shares);
            });
            const Shares all = team.all(part);
            return all.before.units() < top_p_limit(all.total.units(), choice.top_p);
        };
        if (may_win(limit) && (!cuts_p || top_p_keeps_it())) {
            return candidate;
        }
        const float least_next = fmaxf(limit, least_winner);
        Noisiest noisiest(choice.noise);
        const auto see = [&](const Run &run) {
            if (run.greatest() >= least_next) {
                noisiest.see(run, [&](std::int32_t token, float logit) {
                    return is_before(token, logit) && may_win(logit);
                });
            }
        };
        team.each(vocabulary, logits, see, [&] { noisiest.learn(team); });
        drawn = team.all(GreatestRank{noisiest.rank()}).rank;
    }
    return kNoToken;
}

}  // namespace llama_te
