// A team of one thread.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "sampling/team.h"

namespace llama_te {

// The logits of a row as float32.
class RowOfFloats {
public:
    explicit RowOfFloats(std::int32_t vocabulary)
        : logits_(round_up(static_cast<std::size_t>(vocabulary), std::size_t{kRun}), -HUGE_VALF) {
    }

    void set(std::int32_t token, float logit) {
        logits_[static_cast<std::size_t>(token)] = logit;
    }

    float at(std::int32_t token) const {
        return logits_[static_cast<std::size_t>(token)];
    }

private:
    std::vector<float> logits_;
};

// See team.h.
class Alone {
public:
    template <typename Logits, typename Visit, typename After = Nothing>
    void each(std::int32_t vocabulary, const Logits &logits, const Visit &visit, const After &after = {}) const {
        for (std::int32_t first = 0; first < vocabulary; first += kRun) {
            Run run;
            run.first = first;
            for (int i = 0; i < kRun; ++i) {
                run.logits[i] = logits.at(first + i);
            }
            visit(run);
            after();
        }
    }

    float greatest_nearby(float number) const {
        return number;
    }

    template <typename Part>
    const Part &all(const Part &part) const {
        return part;
    }

    template <typename Logits, typename BucketOf, typename Visit = Nothing>
    Bucket find(std::int32_t vocabulary, std::int32_t k, const Logits &logits, const BucketOf &bucket_of,
                const Visit &visit = {}) {
        std::fill(counts_.begin(), counts_.end(), 0);
        each(vocabulary, logits, [&](const Run &run) {
            visit(run);
            for (const float logit : run.logits) {
                if (const int bucket = bucket_of(logit); bucket != kNoBucket) {
                    ++counts_[static_cast<std::size_t>(bucket)];
                }
            }
        });
        std::int32_t before = 0;
        for (int bucket = 0; bucket < kBuckets; ++bucket) {
            const std::int32_t until = before + counts_[static_cast<std::size_t>(bucket)];
            if (k <= until) {
                return {bucket, k - before, until};
            }
            before = until;
        }
        return {kNoBucket, k - before, vocabulary};
    }

    float least_of(std::int32_t, float, const LogitBuckets &) const {
        return -HUGE_VALF;
    }

    template <typename Logits, typename BucketOf, typename Visit>
    void greatest(std::int32_t vocabulary, int count, const Bucket &last, const Logits &logits,
                  const BucketOf &bucket_of, const Visit &visit) {
        ranks_.clear();
        for (std::int32_t token = 0; token < vocabulary; ++token) {
            const float logit = logits.at(token);
            if (last.reaches(bucket_of(logit))) {
                ranks_.push_back(rank_of(logit, token));
            }
        }
        std::partial_sort(ranks_.begin(), ranks_.begin() + count, ranks_.end(), std::greater<>());
        for (int place = 0; place < count; ++place) {
            visit(place, ranks_[static_cast<std::size_t>(place)]);
        }
    }

    bool is_first() const {
        return true;
    }

private:
    std::vector<Rank> ranks_;
    std::vector<std::int32_t> counts_ = std::vector<std::int32_t>(kBuckets);
};

}  // namespace llama_te
