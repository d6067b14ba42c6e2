// draw on the GPU. A cluster of blocks shares a row: the fewer rows, the more blocks.

#include "sampling/draw.h"

#include <cooperative_groups.h>

#include <cstring>

#include "include/launch.cuh"
#include "include/vector.cuh"
#include "include/warp.cuh"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxBlocks = 8;  // of a cluster that every GPU launches
constexpr int kPartBytes = 32;
constexpr int kBucketsOfThread = kBuckets / kThreads;

struct SharedStorage {
    std::int32_t counts[kBuckets];
    std::int32_t counts_of_warp[kWarps];
    Bucket found;
    alignas(16) unsigned char part_of_warp[kWarps][kPartBytes];
    // Of the block, which the others read. They may still read one of them when the block writes the other.
    alignas(16) unsigned char part[2][kPartBytes];
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

// The threads of a cluster; see draw_row.h.
class Cluster {
public:
    explicit __device__ Cluster(SharedStorage &shared)
        : shared_(shared), blocks_(static_cast<int>(cluster_.num_blocks())) {
    }

    template <typename Visit>
    __device__ void each(std::int32_t vocabulary, const Visit &visit) const {
        const auto first = static_cast<std::int32_t>(cluster_.block_rank() * kThreads + threadIdx.x);
#pragma unroll 4
        for (std::int32_t token = first; token < vocabulary; token += blocks_ * kThreads) {
            visit(token);
        }
    }

    template <typename Part>
    __device__ Part all(Part part) {
        static_assert(sizeof(Part) <= kPartBytes && sizeof(Part) % sizeof(unsigned) == 0);
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            part.merge(part_of_lane(part, distance));
        }
        if (lane == 0) {
            std::memcpy(shared_.part_of_warp[warp], &part, sizeof part);
        }
        __syncthreads();
        unsigned char *const slot = shared_.part[turn_];
        turn_ ^= 1;
        if (warp == 0) {
            Part merged;
            if (lane < kWarps) {
                std::memcpy(&merged, shared_.part_of_warp[lane], sizeof merged);
            }
#pragma unroll
            for (int distance = kWarps / 2; distance > 0; distance /= 2) {
                merged.merge(part_of_lane(merged, distance));
            }
            if (lane == 0) {
                std::memcpy(slot, &merged, sizeof merged);
            }
        }
        cluster_.sync();
        Part whole;
        for (int block = 0; block < blocks_; ++block) {
            Part other;
            std::memcpy(&other, cluster_.map_shared_rank(slot, block), sizeof other);
            whole.merge(other);
        }
        return whole;
    }

    template <typename BucketOf>
    __device__ Bucket find(std::int32_t vocabulary, std::int32_t k, const BucketOf &bucket_of) {
        for (int bucket = threadIdx.x; bucket < kBuckets; bucket += kThreads) {
            shared_.counts[bucket] = 0;
        }
        __syncthreads();
        each(vocabulary, [&](std::int32_t token) {
            const int bucket = bucket_of(token);
            if (bucket != kNoBucket) {
                atomicAdd(shared_.counts + bucket, 1);
            }
        });
        cluster_.sync();
        // Every block finds the bucket by itself.
        const int first = threadIdx.x * kBucketsOfThread;
        std::int32_t counts[kBucketsOfThread] = {};
        for (int block = 0; block < blocks_; ++block) {
            const std::int32_t *const others = cluster_.map_shared_rank(shared_.counts, block);
#pragma unroll
            for (int i = 0; i < kBucketsOfThread; ++i) {
                counts[i] += others[first + i];
            }
        }
        std::int32_t own = 0;
#pragma unroll
        for (int i = 0; i < kBucketsOfThread; ++i) {
            own += counts[i];
        }
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
        std::int32_t until = own;  // tokens in the buckets up to this thread's last one
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const std::int32_t below = __shfl_up_sync(kWholeWarp, until, distance);
            until += lane >= distance ? below : 0;
        }
        if (lane == kWarp - 1) {
            shared_.counts_of_warp[warp] = until;
        }
        __syncthreads();
        for (int other = 0; other < warp; ++other) {
            until += shared_.counts_of_warp[other];
        }
        std::int32_t left = k - (until - own);
        if (left > 0 && k <= until) {
#pragma unroll
            for (int i = 0; i < kBucketsOfThread; ++i) {
                if (left > 0 && left <= counts[i]) {
                    shared_.found = {first + i, left};
                }
                left -= counts[i];
            }
        }
        cluster_.sync();
        return shared_.found;
    }

    // Waits until no block reads the memory of another one: then blocks may end.
    __device__ void finish() const {
        cluster_.sync();
    }

    __device__ bool is_first_thread() const {
        return cluster_.thread_rank() == 0;
    }

private:
    cooperative_groups::cluster_group cluster_ = cooperative_groups::this_cluster();
    SharedStorage &shared_;
    int blocks_;
    int turn_ = 0;
};

template <ElementType kElement>
__device__ float logit_at(const char *row, std::int32_t token) {
    if constexpr (kElement == ElementType::kFloat32) {
        return reinterpret_cast<const float *>(row)[token];
    } else {
        return Pair<kElement>::unpack(reinterpret_cast<const std::uint16_t *>(row)[token]).x;
    }
}

template <ElementType kElement>
__global__ void __launch_bounds__(kThreads, 2) draw_kernel(const __grid_constant__ DrawArguments a) {
    __shared__ SharedStorage shared;
    allow_next_kernel();
    wait_for_previous_kernel();
    Cluster cluster(shared);
    const auto row = static_cast<std::int32_t>(blockIdx.x / cooperative_groups::this_cluster().num_blocks());
    const char *const logits = a.logits + row * a.row_bytes;
    const Adjustment adjusted = adjustment_of(a, row);
    const auto logit_of = [&](std::int32_t token) { return adjusted(logit_at<kElement>(logits, token), token); };
    const std::int64_t token = draw_row(cluster, logit_of, choice_of(a, row), a.vocabulary);
    if (cluster.is_first_thread()) {
        a.tokens[row] = token;
        record(a, row, token);
    }
    cluster.finish();
}

}  // namespace

void draw_cuda(const DrawArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    int blocks = kMaxBlocks;
    while (blocks > 1 && static_cast<std::int64_t>(blocks) * arguments.rows > multiprocessors(device)) {
        blocks /= 2;
    }
    const LaunchShape shape = {dim3(static_cast<unsigned>(arguments.rows) * blocks), dim3(kThreads), 0, blocks};
    dispatch("draw", Elements{}, arguments.element, [&](auto element) {
        launch_overlapping(draw_kernel<decltype(element)::value>, shape, reinterpret_cast<cudaStream_t>(stream), "draw",
                           arguments);
    });
}

}  // namespace llama_te
