// The epilogue: a block combines its warps' results, and the last block of a row's head combines the splits.

#pragma once

#include "mainloop.cuh"
#include "scheduler.cuh"

namespace llama_te::attention {

// 4 dimensions of a head, not yet divided by the sum of the weights.
struct Combined {
    float2 statistics;  // greatest score, sum of the weights
    float4 values;
};

// Combines the results of `count` disjoint sets of keys: `statistics_of(i)` and `values_of(i)` belong to the i-th set.
template <typename Statistics, typename Values>
__device__ Combined combine(int count, Statistics statistics_of, Values values_of) {
    float most = -INFINITY;
    bool valid = true;
    for (int i = 0; i < count; ++i) {
        const float2 statistics = statistics_of(i);
        most = fmaxf(most, statistics.x);
        valid = valid && !(statistics.y < 0);
    }
    float sum = 0;
    float4 values = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
        const float2 statistics = statistics_of(i);
        const float4 some = values_of(i);
        const float weight = power_of_two(statistics.x - most);
        sum += weight * statistics.y;
        values.x += weight * some.x;
        values.y += weight * some.y;
        values.z += weight * some.z;
        values.w += weight * some.w;
    }
    return {make_float2(most, valid ? sum : kInvalid), values};
}

template <ElementType kElement, int kHeadDim>
__device__ void store_output(const Arguments &a, const WorkItem &item, int head, int dim, const Combined &combined) {
    using Numbers = Pair<kElement>;
    const bool valid = !(combined.statistics.y < 0);
    const float factor = 1.0F / combined.statistics.y;
    uint2 packed = make_uint2(0, 0);
    if (valid) {
        packed.x = Numbers::pack(combined.values.x * factor, combined.values.y * factor);
        packed.y = Numbers::pack(combined.values.z * factor, combined.values.w * factor);
    }
    const std::int64_t query_head = (static_cast<std::int64_t>(item.row) * a.kv_heads + item.kv_head) * a.group + head;
    *reinterpret_cast<uint2 *>(a.output + (query_head * kHeadDim + dim) * kElementBytes) = packed;
}

// Runs `function(head, dim)` for 4 dimensions from `dim` of each query head.
template <int kHeadDim, typename Function>
__device__ void for_output(int group, Function function) {
#pragma unroll 1
    for (int i = threadIdx.x; i < group * (kHeadDim / 4); i += kThreads) {
        function(i / (kHeadDim / 4), i % (kHeadDim / 4) * 4);
    }
}

// Adds this split to the semaphore of its row's head. Returns whether all other splits have finished, so that this block
// can read their partial results.
template <typename Shared>
__device__ bool is_last_split(const Arguments &a, const WorkItem &item, Shared &shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        std::int32_t *const semaphore = a.semaphore(item.row, item.kv_head);
        std::int32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(semaphore) : "memory");
        shared.is_last = before == item.splits - 1;
        if (shared.is_last) {
            *semaphore = 0;  // for the next launch
        }
    }
    __syncthreads();
    return shared.is_last;
}

template <ElementType kElement, int kHeadDim, typename Shared>
__device__ void combine_splits(const Arguments &a, const WorkItem &item, Shared &shared) {
    constexpr int kFloats = kHeadDim + kStatistics;
    auto *const statistics = reinterpret_cast<float2 *>(shared.stages[0]);  // [splits, G]
    for (int i = threadIdx.x; i < item.splits * a.group; i += kThreads) {
        const float *const partial = a.partial(item.row, item.kv_head, i / a.group);
        statistics[i] = __ldcg(reinterpret_cast<const float2 *>(partial + i % a.group * kFloats + kHeadDim));
    }
    __syncthreads();
    const float *const first = a.partial(item.row, item.kv_head, 0);
    const int split_floats = a.group * kFloats;
    for_output<kHeadDim>(a.group, [&](int head, int dim) {
        const Combined combined = combine(
            item.splits, [&](int split) { return statistics[split * a.group + head]; },
            [&](int split) {
                return __ldcg(reinterpret_cast<const float4 *>(first + split * split_floats + head * kFloats + dim));
            });
        store_output<kElement, kHeadDim>(a, item, head, dim, combined);
    });
}

template <ElementType kElement, int kHeadDim, typename Shared>
__device__ void epilogue(const Arguments &a, const WorkItem &item, Shared &shared) {
    float *const partial = a.partial(item.row, item.kv_head, item.index);
    for_output<kHeadDim>(a.group, [&](int head, int dim) {
        const Combined combined = combine(
            kWarps, [&](int warp) { return shared.statistics[warp][head]; },
            [&](int warp) {
                const float *const result = reinterpret_cast<const float *>(shared.stages[warp]);
                return *reinterpret_cast<const float4 *>(result + head * Shared::kResultFloats + dim);
            });
        if (item.splits == 1) {
            store_output<kElement, kHeadDim>(a, item, head, dim, combined);
            return;
        }
        float *const to = partial + head * (kHeadDim + kStatistics);
        *reinterpret_cast<float4 *>(to + dim) = combined.values;
        if (dim == 0) {
            *reinterpret_cast<float2 *>(to + kHeadDim) = combined.statistics;
        }
    });
    if (item.splits > 1 && is_last_split(a, item, shared)) {
        combine_splits<kElement, kHeadDim>(a, item, shared);
    }
}

}  // namespace llama_te::attention
