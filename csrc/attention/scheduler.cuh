// The scheduler: which splits of which rows there are, and which of them a block works on.

#pragma once

#include "shared_storage.cuh"

namespace llama_te::attention {

// Numbers the splits of all rows, row after row. What a block knows of all rows is in shared memory, since registers limit
// the blocks on a multiprocessor. All threads of the block call it.
template <typename Shared>
__device__ void schedule(const Arguments &a, Shared &shared) {
    int counts[kRowsOfThread];
    int of_thread = 0;
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = threadIdx.x * kRowsOfThread + i;
        const int start = row < a.rows ? __ldcg(a.start + row) : -1;
        const bool exists = a.takes(start);
        shared.starts[row] = exists ? start : -1;
        // A row that is left out has one split, which writes its zeros.
        counts[i] = exists ? splits_of(start + 1) : static_cast<int>(row < a.rows);
        of_thread += counts[i];
    }
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    int up_to = of_thread;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int before = __shfl_up_sync(kWholeWarp, up_to, distance);
        up_to += lane >= distance ? before : 0;
    }
    if (lane == kWarp - 1) {
        shared.splits_of_warps[warp] = up_to;
    }
    __syncthreads();
    int next = up_to - of_thread;
#pragma unroll
    for (int i = 0; i < kWarps - 1; ++i) {
        next += i < warp ? shared.splits_of_warps[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        next += counts[i];
        shared.end_splits[threadIdx.x * kRowsOfThread + i] = next;
    }
    __syncthreads();
}

// Finds the row of a split. The thread of that row writes `shared.split`; all threads of the block call it.
template <typename Shared>
__device__ void find_split(Shared &shared, int split) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = static_cast<int>(threadIdx.x) * kRowsOfThread + i;
        const int first = row == 0 ? 0 : shared.end_splits[row - 1];
        if (split >= first && split < shared.end_splits[row]) {
            shared.split = Split{row, split - first, shared.starts[row]};
        }
    }
}

// The block of memory that holds a place of a row, or -1. Everything that is read before the wait for the previous
// kernel comes from the L2 cache: the L1 cache may still hold what an earlier kernel saw.
__device__ inline int block_of(const CacheIndex &index, int row, int place) {
    const int block =
        index.page_table == nullptr ? row : __ldcg(index.table_entry(row, place / index.block_places));
    return static_cast<unsigned>(block) < static_cast<unsigned>(index.blocks) ? block : -1;
}

__device__ inline int place_in_block(const CacheIndex &index, int place) {
    return place % index.block_places;  // in a contiguous cache a block is a row, and this is the place itself
}

// A split of a row for one key/value head.
struct WorkItem : Split {
    int kv_head;
    int splits;  // of the row
    int first_tile;
    int end_tile;
    bool has_new;   // the new token is in this split
    int new_block;  // the block of memory for it, -1: none

    __device__ WorkItem(const Arguments &a, const Split &split, int kv_head_) : Split(split), kv_head(kv_head_) {
        const int tiles = keys_per_split(start + 1) / kTileKeys;
        splits = start < 0 ? 1 : splits_of(start + 1);
        first_tile = index * tiles;
        end_tile = min(first_tile + tiles, divide_up(start + 1, kTileKeys));
        has_new = start >= 0 && index == splits - 1;
        new_block = has_new ? block_of(a.index, row, start) : -1;
    }
};

}  // namespace llama_te::attention
