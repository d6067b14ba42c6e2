// What the threads that share the tokens of a row do together.
//
// A team is one thread on the host, `Alone`, or a cluster of blocks on the GPU, `Cluster`. It has
//   each(vocabulary, visit)     calls visit(token) for the thread's tokens, in ascending order
//   all(part)                   merges the threads' parts, by Part::merge; every thread gets the result
//   find(vocabulary, k, bucket) counts the tokens in each bucket(token) and returns the one that has the k-th token,
//                               from bucket 0 on; a token in bucket kNoBucket does not count
//   greatest(vocabulary, count, rank, visit)
//                               calls visit(place, rank) for the greatest of rank(token), in falling order, in one thread
//   is_first()                  is true in one thread
// Parts are integers whose sums and maxima have no order. So the results of a row depend on nothing but the row.

#pragma once

#include <cstdint>

#include "include/integer.h"
#include "sampling/order.h"

namespace llama_te {

constexpr int kBuckets = 2048;
constexpr int kNoBucket = -1;

// The bucket that has the k-th token, and which of the bucket's tokens that is, from 1 on.
struct Bucket {
    int bucket;
    std::int32_t k;
};

struct GreatestRank {
    Rank rank = 0;

    LLAMA_TE_HOST_DEVICE void merge(const GreatestRank &other) {
        rank = other.rank > rank ? other.rank : rank;
    }
};

}  // namespace llama_te
