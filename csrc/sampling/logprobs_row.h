// The log-probabilities of a row, on the host and on the GPU.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/logprobs.h"
#include "sampling/order.h"
#include "sampling/team.h"

namespace llama_te {

// A sum of numbers up to 1, in units of 2^-44: of 2^18 tokens the rounding makes no difference in float32.
struct UnitSum {
    std::int64_t units = 0;

    LLAMA_TE_HOST_DEVICE void add(float number) {
        units += static_cast<std::int64_t>(number * 0x1p44F);
    }
    LLAMA_TE_HOST_DEVICE void merge(const UnitSum &other) {
        units += other.units;
    }
    LLAMA_TE_HOST_DEVICE float logarithm() const {
        return static_cast<float>(log(static_cast<double>(units) * 0x1p-44));
    }
};

template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE void logprobs_row(Team &team, const Logits &logits, const LogprobsArguments &a,
                                       std::int32_t row) {
    Best best;
    team.each(a.vocabulary, logits, [&](std::int32_t token, float logit) { best.see(token, logit); });
    const Rank first = team.all(GreatestRank{best.rank()}).rank;
    const bool is_finite = token_of(first) != kNoToken;
    const float greatest = number_of(key_of(first));
    const LogitBuckets bucket_of{greatest};
    UnitSum part;
    const auto add = [&](float logit) { part.add(is_finite ? expf(logit - greatest) : 0.0F); };
    Bucket last = {};
    if (a.likeliest > 0) {
        last = team.find(a.vocabulary, a.likeliest, logits, [&](float logit) {
            add(logit);
            return bucket_of(logit);
        });
    } else {
        team.each(a.vocabulary, logits, [&](std::int32_t, float logit) { add(logit); });
    }
    const float log_sum = team.all(part).logarithm();
    const auto logprob_of = [&](float logit) { return is_finite ? logit - greatest - log_sum : NAN; };
    if (team.is_first()) {
        const std::int64_t token = a.tokens[row];
        const bool is_known = 0 <= token && token < a.vocabulary;
        a.logprobs[row] = is_known ? logprob_of(logits.of(logits.read(static_cast<std::int32_t>(token)))) : NAN;
    }
    if (a.likeliest == 0) {
        return;
    }
    team.greatest(a.vocabulary, a.likeliest, last, logits, bucket_of, [&](int place, Rank found) {
        const std::int64_t index = static_cast<std::int64_t>(row) * a.likeliest + place;
        a.top_logprobs[index] = logprob_of(number_of(key_of(found)));
        a.top_tokens[index] = 0xffffffffU - static_cast<std::uint32_t>(found);
    });
}

}  // namespace llama_te
