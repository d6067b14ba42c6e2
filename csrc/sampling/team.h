// What the threads that share the tokens of a row do together.
//
// A team is one thread on the host, `Alone`, or a cluster of blocks on the GPU, `Cluster`. It has
//   each(vocabulary, logits, visit, after)
//                               calls visit(run) for the runs of tokens that the thread has, in ascending order, and
//                               after() once each run or more often, together with the threads nearby
//   greatest_nearby(number)     the greatest number of some threads nearby, which all call it
//   all(part)                   merges the threads' parts, by Part::merge; every thread gets the result
//   find(vocabulary, k, logits, bucket_of, visit)
//                               counts the tokens in each bucket_of(logit) and returns the bucket that has the k-th token,
//                               from bucket 0 on; tokens in kNoBucket come last; also calls visit(run) as `each` does
//   least_of(k, own, bucket_of) a number that the k-th logit is not below, or -inf; `own` is the greatest logit of the
//                               thread: the k-th of the threads' own logits is at most the k-th of all
//   greatest(vocabulary, count, last, logits, bucket_of, visit)
//                               calls visit(place, rank) for each of the greatest ranks, in one thread each; `last` is
//                               what `find` has returned for the count-th token
//   is_first()                  is true in one thread
// `logits` has at(token), the logit of one token. For a cluster it has also read(first), which reads the memory
// of a run alone, and of(what it read, run), which sets the run's logits. So threads read runs ahead.
// Parts are integers whose sums and maxima have no order. So the results of a row depend on nothing but the row.

#pragma once

#include <cmath>
#include <cstdint>

#include "include/integer.h"
#include "sampling/order.h"
#include "sampling/run.h"

namespace llama_te {

constexpr int kBuckets = 2048;
constexpr int kNoBucket = -1;
constexpr float kBucketsOfLogit = 64.0F;  // of a difference of 1 between logits

// The bucket that has the k-th token.
struct Bucket {
    int bucket;
    std::int32_t k;      // which of the bucket's tokens that is, from 1 on
    std::int32_t until;  // tokens in this bucket and in those before it

    // Whether a bucket is this one or one before it. As unsigned integers, kNoBucket is the last bucket.
    LLAMA_TE_HOST_DEVICE bool reaches(int other) const {
        return static_cast<unsigned>(other) <= static_cast<unsigned>(bucket);
    }
};

// Spreads the logits of a model well: threads that count in one bucket wait for each other. Most logits of a sure model
// are so far from the greatest one that they are in no bucket.
struct LogitBuckets {
    float greatest;
    float least = -HUGE_VALF;  // `find` may pass over logits below it

    // Below a bucket's logits. The margin is more than all roundings.
    LLAMA_TE_HOST_DEVICE float below(int bucket) const {
        const float distance = static_cast<float>(bucket + 2) / kBucketsOfLogit + 1e-6F * fabsf(greatest);
        return bucket == kNoBucket ? -HUGE_VALF : greatest - distance;
    }

    LLAMA_TE_HOST_DEVICE int operator()(float logit) const {
        const float distance = (greatest - logit) * kBucketsOfLogit;
        return distance < kBuckets ? (distance > 0 ? static_cast<int>(distance) : 0) : kNoBucket;
    }
};

struct GreatestRank {
    Rank rank = 0;

    LLAMA_TE_HOST_DEVICE void merge(const GreatestRank &other) {
        rank = other.rank > rank ? other.rank : rank;
    }
};

struct Nothing {
    template <typename... Seen>
    LLAMA_TE_HOST_DEVICE void operator()(const Seen &...) const {
    }
};

}  // namespace llama_te
