// The log-probabilities of a row, on the host and on the GPU.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/fixed_sum.h"
#include "sampling/logprobs.h"
#include "sampling/order.h"
#include "sampling/team.h"

namespace llama_te {

template <typename Team, typename Logits>
LLAMA_TE_HOST_DEVICE void logprobs_row(Team &team, const Logits &logits, const LogprobsArguments &a,
                                       std::int32_t row) {
    Best best;
    team.each(a.vocabulary, logits, [&](const Run &run) { best.see(run); });
    const Rank first = team.all(GreatestRank{best.rank()}).rank;
    const bool is_finite = token_of(first) != kNoToken;
    const float greatest = number_of(key_of(first));
    LogitBuckets bucket_of{greatest};
    FixedSum<44> part;  // so precise that for 2^18 tokens the rounding makes no difference in float32
    const auto add = [&](const Run &run) {
        if (is_finite) {
            float weights[kRun];
            for (int i = 0; i < kRun; ++i) {
                weights[i] = expf(run.logits[i] - greatest);
            }
            part.add(weights);
        }
    };
    Bucket last = {};
    if (a.likeliest > 0) {
        bucket_of.least = team.least_of(a.likeliest, best.logit(), bucket_of);
        last = team.find(a.vocabulary, a.likeliest, logits, bucket_of, add);
    } else {
        team.each(a.vocabulary, logits, add);
    }
    const auto log_sum = static_cast<float>(log(static_cast<double>(team.all(part).units()) * 0x1p-44));
    const auto logprob_of = [&](float logit) { return is_finite ? logit - greatest - log_sum : NAN; };
    if (team.is_first()) {
        const std::int64_t token = a.tokens[row];
        const bool is_known = 0 <= token && token < a.vocabulary;
        a.logprobs[row] = is_known ? logprob_of(logits.at(static_cast<std::int32_t>(token))) : NAN;
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
