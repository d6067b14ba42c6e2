// A team of one thread.

#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "sampling/team.h"

namespace llama_te {

// See team.h.
class Alone {
public:
    template <typename Visit>
    void each(std::int32_t vocabulary, const Visit &visit) const {
        for (std::int32_t token = 0; token < vocabulary; ++token) {
            visit(token);
        }
    }

    template <typename Part>
    const Part &all(const Part &part) const {
        return part;
    }

    template <typename BucketOf>
    Bucket find(std::int32_t vocabulary, std::int32_t k, const BucketOf &bucket_of) {
        std::fill(counts_.begin(), counts_.end(), 0);
        for (std::int32_t token = 0; token < vocabulary; ++token) {
            if (const int bucket = bucket_of(token); bucket != kNoBucket) {
                ++counts_[static_cast<std::size_t>(bucket)];
            }
        }
        int bucket = 0;
        while (k > counts_[static_cast<std::size_t>(bucket)]) {
            k -= counts_[static_cast<std::size_t>(bucket++)];
        }
        return {bucket, k};
    }

    template <typename RankOf, typename Visit>
    void greatest(std::int32_t vocabulary, int count, const RankOf &rank_of, const Visit &visit) {
        ranks_.clear();  // a heap with the least rank on top
        for (std::int32_t token = 0; token < vocabulary; ++token) {
            const Rank rank = rank_of(token);
            if (static_cast<int>(ranks_.size()) == count) {
                if (rank < ranks_.front()) {
                    continue;
                }
                std::pop_heap(ranks_.begin(), ranks_.end(), std::greater<>());
                ranks_.pop_back();
            }
            ranks_.push_back(rank);
            std::push_heap(ranks_.begin(), ranks_.end(), std::greater<>());
        }
        std::sort_heap(ranks_.begin(), ranks_.end(), std::greater<>());
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
