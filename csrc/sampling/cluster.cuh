// A cluster of blocks that shares the rows of logits: the fewer rows, the more blocks share each.

#pragma once

#include <cooperative_groups.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "include/launch.cuh"
#include "include/vector.cuh"
#include "include/warp.cuh"
#include "sampling/order.h"
#include "sampling/team.h"

namespace llama_te {

constexpr int kClusterThreads = 512;  // of a block
constexpr int kClusterWarps = kClusterThreads / kWarp;
constexpr int kMostBlocks = 8;  // of a cluster, the most that every GPU launches
constexpr int kBucketsOfThread = kBuckets / kClusterThreads;
static_assert(kBucketsOfThread == 4);  // a vector
constexpr int kBlocksOfMultiprocessor = 2;  // blocks that run at once
constexpr int kCandidates = 1024;             // most ranks to sort

// A part of any kind on its way between threads, in vectors: the compiler would copy a part of unknown alignment byte by
// byte.
struct SharedPart {
    uint4 vectors[2];

    template <typename Part>
    __device__ static SharedPart of(const Part &part) {
        static_assert(sizeof(Part) <= sizeof(SharedPart) && sizeof(Part) % sizeof(unsigned) == 0);
        SharedPart shared = {};
        std::memcpy(&shared, &part, sizeof part);
        return shared;
    }

    template <typename Part>
    __device__ Part as() const {
        Part part;
        std::memcpy(&part, this, sizeof part);
        return part;
    }
};

struct ClusterStorage {
    // Of all warps of the cluster, which write them into each of its blocks. A block may still read those of one turn
    // when others write those of the next.
    SharedPart parts[2][kMostBlocks * kClusterWarps];
    union alignas(16) {
        std::int32_t counts[kBuckets];
        Rank candidates[kCandidates];  // of the cluster, in its first block
    };
    int candidate_count;
    std::int32_t counts_of_warp[kClusterWarps];
    Bucket found;
};

template <typename Part>
__device__ Part part_of_lane(const Part &part, int distance) {
    unsigned words[sizeof(Part) / sizeof(unsigned)];
    std::memcpy(words, &part, sizeof part);
#pragma unroll
    for (unsigned &word : words) {
        word = __shfl_xor_sync(kWholeWarp, word, distance);
    }
    Part other;
    std::memcpy(&other, words, sizeof other);
    return other;
}

// See team.h.
class Cluster {
public:
    explicit __device__ Cluster(ClusterStorage &shared)
        : shared_(shared), blocks_(static_cast<int>(cluster_.num_blocks())) {
        if (blocks_ > 1) {
            cluster_.barrier_arrive();
        }
    }

    template <typename Logits, typename Visit, typename After = Nothing>
    __device__ void each(std::int32_t vocabulary, const Logits &logits, const Visit &visit,
                         const After &after = {}) const {
        const int step = blocks_ * kClusterThreads * kRun;
        const int own = static_cast<int>(cluster_.thread_rank()) * kRun;
        typename Logits::Read ahead;
        // Each turn reads the run of the next one; the first turn only reads.
#pragma unroll 1
        for (int start = -step; start < vocabulary; start += step) {  // alike in all threads
            const int first = start + own;
            const typename Logits::Read read = ahead;
            if (first < vocabulary - step) {
                ahead = logits.read(first + step);
            }
            if (start >= 0) {
                if (first < vocabulary) {
                    Run run;
                    run.first = first;
                    logits.of(read, run);
                    visit(run);
                }
                after();
            }
        }
    }

    __device__ float greatest_nearby(float number) const {
        return number_of(__reduce_max_sync(kWholeWarp, ordered(number)));
    }

    template <typename Part>
    __device__ Part all(Part part) {
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            part.merge(part_of_lane(part, distance));
        }
        SharedPart *const parts = shared_.parts[turn_];
        turn_ ^= 1;
        wait_for_start();
        if (lane < blocks_) {
            const int place = static_cast<int>(cluster_.block_rank()) * kClusterWarps + warp;
            cluster_.map_shared_rank(parts, lane)[place] = SharedPart::of(part);
        }
        sync();
        Part whole;
#pragma unroll
        for (int i = 0; i < kMostBlocks * kClusterWarps / kWarp; ++i) {
            if (const int place = i * kWarp + lane; place < blocks_ * kClusterWarps) {
                whole.merge(parts[place].template as<Part>());
            }
        }
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            whole.merge(part_of_lane(whole, distance));
        }
        return whole;
    }

    template <typename Logits, typename BucketOf, typename Visit = Nothing>
    __device__ Bucket find(std::int32_t vocabulary, std::int32_t k, const Logits &logits, const BucketOf &bucket_of,
                           const Visit &visit = {}) {
        clear_counts();
        each(vocabulary, logits, [&](const Run &run) {
            visit(run);
            if (run.greatest() < bucket_of.least) {
                return;
            }
            for (const float logit : run.logits) {
                count(bucket_of(logit));
            }
        });
        return bucket_of_kth(vocabulary, k);
    }

    __device__ float least_of(std::int32_t k, float own, const LogitBuckets &bucket_of) {
        clear_counts();
        count(bucket_of(own));
        return bucket_of.below(bucket_of_kth(0, k).bucket);
    }

    // Waits until no block reads the memory of another one: then blocks may end.
    __device__ void finish() {
        sync();
    }

    __device__ bool is_first() const {
        return cluster_.thread_rank() == 0;
    }

    // The row of this cluster.
    __device__ std::int32_t row() const {
        return static_cast<std::int32_t>(blockIdx.x) / blocks_;
    }

    template <typename Logits, typename BucketOf, typename Visit>
    __device__ void greatest(std::int32_t vocabulary, int count, const Bucket &last, const Logits &logits,
                             const BucketOf &bucket_of, const Visit &visit) {
        if (last.until <= kCandidates) {
            sort(vocabulary, count, last, logits, bucket_of, visit);
        } else {
            take(vocabulary, count, logits, visit);
        }
    }

private:
    __device__ void clear_counts() {
        for (int bucket = threadIdx.x; bucket < kBuckets; bucket += kClusterThreads) {
            shared_.counts[bucket] = 0;
        }
        if (threadIdx.x == 0) {
            shared_.candidate_count = 0;
        }
        __syncthreads();
    }

    __device__ void count(int bucket) {
        if (bucket != kNoBucket) {
            atomicAdd(shared_.counts + bucket, 1);
        }
    }

    // Returns the bucket that has the k-th of the counted tokens.
    __device__ Bucket bucket_of_kth(std::int32_t vocabulary, std::int32_t k) {
        __syncthreads();
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
        const int4 own = reinterpret_cast<const int4 *>(shared_.counts)[threadIdx.x];
        const int sum = __reduce_add_sync(kWholeWarp, own.x + own.y + own.z + own.w);
        if (lane == 0) {
            shared_.counts_of_warp[warp] = sum;
        }
        sync();
        if (warp == 0) {
            // Other blocks' memory is far: the sums of the warps tell which warp's buckets to read.
            Counted sums;
            if (lane < kClusterWarps) {
#pragma unroll
                for (int block = 0; block < kMostBlocks; ++block) {
                    if (block < blocks_) {
                        sums.count += cluster_.map_shared_rank(shared_.counts_of_warp, block)[lane];
                    }
                }
            }
            sums.scan(0);
            const unsigned reached = __ballot_sync(kWholeWarp, sums.until >= k);
            if (reached == 0) {
                if (lane == kWarp - 1) {
                    shared_.found = {kNoBucket, k - sums.until, vocabulary};
                }
            } else {
                const int place = __ffs(static_cast<int>(reached)) - 1;
                const int before = __shfl_sync(kWholeWarp, sums.until - sums.count, place);
                find_in_warp(place, before, k);
            }
        }
        sync();
        return shared_.found;
    }

    // Numbers of tokens in the lanes of a warp.
    struct Counted {
        int count = 0;
        int until = 0;  // in this lane and in those before it

        __device__ void scan(int before) {
            until = count;
#pragma unroll
            for (int distance = 1; distance < kWarp; distance *= 2) {
                const int below = __shfl_up_sync(kWholeWarp, until, distance);
                until += static_cast<int>(threadIdx.x % kWarp) >= distance ? below : 0;
            }
            until += before;
        }
    };

    // Stores the bucket that has the k-th token, which is among the buckets of one warp.
    __device__ void find_in_warp(int warp, int before, std::int32_t k) {
        const int lane = threadIdx.x % kWarp;
        int counts[kBucketsOfThread] = {};
        Counted buckets;
#pragma unroll
        for (int block = 0; block < kMostBlocks; ++block) {
            if (block < blocks_) {
                const int *const others = cluster_.map_shared_rank(shared_.counts, block);
                const int4 other = reinterpret_cast<const int4 *>(others)[warp * kWarp + lane];
                counts[0] += other.x;
                counts[1] += other.y;
                counts[2] += other.z;
                counts[3] += other.w;
            }
        }
        buckets.count = counts[0] + counts[1] + counts[2] + counts[3];
        buckets.scan(before);
        before = buckets.until - buckets.count;
#pragma unroll
        for (int i = 0; i < kBucketsOfThread; ++i) {
            if (before < k && k <= before + counts[i]) {
                const int bucket = (warp * kWarp + lane) * kBucketsOfThread + i;
                shared_.found = {bucket, k - before, before + counts[i]};
            }
            before += counts[i];
        }
    }

    // Waits until all blocks of the cluster run: before that they have no shared memory to write to.
    __device__ void wait_for_start() {
        if (blocks_ > 1 && !started_) {
            cluster_.barrier_wait();
        }
        started_ = true;
    }

    __device__ void sync() {
        wait_for_start();
        if (blocks_ == 1) {
            __syncthreads();  // without a fence of the GPU's memory
        } else {
            cluster_.sync();
        }
    }

    // Collects the tokens up to a bucket in the first block, where the place of each is the number of greater ones.
    template <typename Logits, typename BucketOf, typename Visit>
    __device__ void sort(std::int32_t vocabulary, int count, const Bucket &last, const Logits &logits,
                         const BucketOf &bucket_of, const Visit &visit) {
        Rank *const candidates = cluster_.map_shared_rank(shared_.candidates, 0);
        int *const candidate_count = cluster_.map_shared_rank(&shared_.candidate_count, 0);
        each(vocabulary, logits, [&](const Run &run) {
            if (!last.reaches(bucket_of(run.greatest()))) {
                return;
            }
            for (int i = 0; i < kRun; ++i) {
                if (last.reaches(bucket_of(run.logits[i])) && run.first + i < vocabulary) {
                    candidates[atomicAdd(candidate_count, 1)] = rank_of(run.logits[i], run.first + i);
                }
            }
        });
        sync();
        if (cluster_.block_rank() != 0) {
            return;
        }
        for (int own = threadIdx.x; own < last.until; own += kClusterThreads) {
            const Rank rank = shared_.candidates[own];
            int place = 0;
            for (int other = 0; other < last.until; ++other) {
                place += shared_.candidates[other] > rank ? 1 : 0;
            }
            if (place < count) {
                visit(place, rank);
            }
        }
    }

    // Takes one token after the other: each is the greatest one that its thread has left.
    template <typename Logits, typename Visit>
    __device__ void take(std::int32_t vocabulary, int count, const Logits &logits, const Visit &visit) {
        GreatestRank own;
        const auto merge_below = [&](Rank limit) {
            each(vocabulary, logits, [&](const Run &run) {
                for (int i = 0; i < kRun; ++i) {
                    const Rank rank = rank_of(run.logits[i], run.first + i);
                    own.merge({rank < limit ? rank : 0});
                }
            });
        };
        merge_below(~Rank{0});
        for (int place = 0; place < count; ++place) {
            const GreatestRank found = all(own);
            if (is_first()) {
                visit(place, found.rank);
            }
            if (own.rank == found.rank) {
                own.rank = 0;
                merge_below(found.rank);
            }
        }
    }

    cooperative_groups::cluster_group cluster_ = cooperative_groups::this_cluster();
    ClusterStorage &shared_;
    int blocks_;
    int turn_ = 0;
    bool started_ = false;
};

// The numbers of a run's tokens in a table of unsigned integers of 1, 2 or 4 bytes, as they lie in memory.
template <typename Number>
struct RunOf {
    static constexpr int kOfWord = sizeof(unsigned) / sizeof(Number);
    static constexpr int kWords = kRun / kOfWord;

    unsigned words[kWords] = {};

    // Reads vectors where the address allows them. Tokens past the end of the vocabulary get the padding.
    __device__ static RunOf read(const Number *table, std::int32_t first, std::int32_t vocabulary, Number padding) {
        using Access = std::conditional_t<kWords == 2, uint2, uint4>;
        constexpr int kAccesses = sizeof(words) / sizeof(Access);
        const Number *const numbers = table + first;
        RunOf run;
        if (first <= vocabulary - kRun && reinterpret_cast<std::uintptr_t>(numbers) % sizeof(Access) == 0) {
#pragma unroll
            for (int i = 0; i < kAccesses; ++i) {
                const Access access = reinterpret_cast<const Access *>(numbers)[i];
                std::memcpy(run.words + i * (kWords / kAccesses), &access, sizeof access);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                const Number number = i < vocabulary - first ? numbers[i] : padding;
                run.words[i / kOfWord] |= static_cast<unsigned>(number) << shift(i);
            }
        }
        return run;
    }

    __device__ Number operator[](int i) const {
        return static_cast<Number>(words[i / kOfWord] >> shift(i));
    }

private:
    __device__ static constexpr int shift(int i) {
        return i % kOfWord * 8 * static_cast<int>(sizeof(Number));
    }
};

// A row of logits in memory.
template <ElementType kElement>
class RowOfElements {
public:
    using Number = std::conditional_t<kElement == ElementType::kFloat32, std::uint32_t, std::uint16_t>;
    using Read = RunOf<Number>;

    __device__ RowOfElements(const char *row, std::int32_t vocabulary)
        : row_(reinterpret_cast<const Number *>(row)), vocabulary_(vocabulary) {
    }

    __device__ float at(std::int32_t token) const {
        if constexpr (kElement == ElementType::kFloat32) {
            return __uint_as_float(row_[token]);
        } else {
            return Pair<kElement>::unpack(row_[token]).x;
        }
    }

    __device__ Read read(std::int32_t first) const {
        return Read::read(row_, first, vocabulary_, kLowest);
    }

    __device__ static void of(const Read &read, Run &run) {
        if constexpr (kElement == ElementType::kFloat32) {
            for (int i = 0; i < kRun; ++i) {
                run.logits[i] = __uint_as_float(read.words[i]);
            }
        } else {
            for (int i = 0; i < kRun / 2; ++i) {
                const float2 pair = Pair<kElement>::unpack(read.words[i]);
                run.logits[2 * i] = pair.x;
                run.logits[2 * i + 1] = pair.y;
            }
        }
    }

private:
    // The bits of -inf.
    static constexpr Number kLowest = kElement == ElementType::kFloat32    ? 0xff800000U
                                      : kElement == ElementType::kBFloat16 ? 0xff80U
                                                                           : 0xfc00U;

    const Number *row_;
    std::int32_t vocabulary_;
};

// Launches a kernel of `Arguments` with as many blocks for each row as still run all at once. Blocks of a row are side by
// side in the grid.
template <typename Arguments>
void launch_clusters(void (*kernel)(Arguments), std::int32_t rows, int device, std::uintptr_t stream, const char *name,
                     const Arguments &arguments) {
    const DeviceGuard guard(device);
    int blocks = kMostBlocks;
    while (blocks > 1 && static_cast<std::int64_t>(blocks) * rows > kBlocksOfMultiprocessor * multiprocessors(device)) {
        blocks /= 2;
    }
    const LaunchShape shape = {dim3(static_cast<unsigned>(rows) * blocks), dim3(kClusterThreads), 0, blocks};
    launch_overlapping(kernel, shape, reinterpret_cast<cudaStream_t>(stream), name, arguments);
}

}  // namespace llama_te
