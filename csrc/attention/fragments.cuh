// The fragments that a warp's tensor core products read of a tile of keys or values.
//
// A product has 16 rows (keys, or dimensions of values), 16 columns over which it sums (dimensions, or keys), and 8 query
// heads. Lane l holds rows l / 4 and 8 more, and columns 2 (l % 4), the next, and 8 more of each.
//
// An FP8 tile has a vector of 16 dimensions where a bfloat16 tile has one of 8. Matrices are loaded in units of 2 bytes, and
// which dimension is which row or column is free as long as all agree, so no lane exchanges bytes with another:
//
// - Keys: a lane gets 4 neighbouring dimensions of a key, 4 (l % 4) and on. The first and third are its columns 2 (l % 4)
//   and the next, the second and fourth those 8 further on. Queries have the same order.
// - Values: transposed units give a lane dimensions 2 (l / 4) and the next of 2 keys. The first is its row l / 4, the
//   second the row 8 further on. The output is stored accordingly.

#pragma once

#include "include/e4m3.cuh"
#include "include/mma.cuh"
#include "shared_storage.cuh"

namespace llama_te::attention {

// Calls `function(step, fragment)` for the keys and each 16 dimensions of a tile.
template <int kHeadDim, bool kFp8, typename Function>
__device__ void for_keys(unsigned tile, Function function) {
    constexpr int kVectors = Tile<kHeadDim, kFp8>::kVectors;
    const int lane = threadIdx.x % kWarp;
    const LaneRow<kHeadDim, kFp8> key(tile, lane % 16, lane / 16);
    if constexpr (!kFp8) {
#pragma unroll
        for (int step = 0; step < kVectors / 2; ++step) {
            unsigned keys_by_dims[4];
            load_matrices(keys_by_dims, key.pair(step));
            function(step, keys_by_dims);
        }
    } else {
#pragma unroll
        for (int step = 0; step < kVectors; step += 2) {
            unsigned packed[4];  // the first 8 keys, the others; then the next vector's
            const bool is_pair = step + 1 < kVectors;
            if (is_pair) {
                load_matrices(packed, key.pair(step / 2));
            } else {
                load_two_matrices(packed, key.pair(step / 2));
            }
#pragma unroll
            for (int i = 0; i < (is_pair ? 2 : 1); ++i) {
                unsigned keys_by_dims[4];
                expand_fp8(packed[2 * i], keys_by_dims[0], keys_by_dims[2]);
                expand_fp8(packed[2 * i + 1], keys_by_dims[1], keys_by_dims[3]);
                function(step + i, keys_by_dims);
            }
        }
    }
}

// The fragments of a query head that belong to those of keys; FP8 tiles need queries times 2^60.
template <bool kFp8>
__device__ void load_query(const char *head, int step, unsigned (&fragment)[2]) {
    const int member = threadIdx.x % 4;
    const char *const from = head + step * 2 * kVectorBytes;
    if constexpr (!kFp8) {
        fragment[0] = *reinterpret_cast<const unsigned *>(from + member * 2 * kElementBytes);
        fragment[1] = *reinterpret_cast<const unsigned *>(from + member * 2 * kElementBytes + kVectorBytes);
    } else {
        const uint2 four = *reinterpret_cast<const uint2 *>(from + member * 4 * kElementBytes);
        const unsigned first = multiply_pairs(four.x, kFactorOfPair);
        const unsigned second = multiply_pairs(four.y, kFactorOfPair);
        fragment[0] = __byte_perm(first, second, 0x5410);
        fragment[1] = __byte_perm(first, second, 0x7632);
    }
}

// Calls `function(step, fragment)` for each 16 dimensions of the values of a tile and its keys.
template <int kHeadDim, bool kFp8, typename Function>
__device__ void for_values(unsigned tile, Function function) {
    constexpr int kVectors = Tile<kHeadDim, kFp8>::kVectors;
    const int lane = threadIdx.x % kWarp;
    if constexpr (!kFp8) {
        const LaneRow<kHeadDim, kFp8> value(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int step = 0; step < kVectors / 2; ++step) {
            unsigned dims_by_keys[4];
            load_transposed_matrices(dims_by_keys, value.pair(step));
            function(step, dims_by_keys);
        }
    } else {
        const LaneRow<kHeadDim, kFp8> value(tile, lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < kVectors; step += 2) {
            unsigned packed[4];  // of the first 8 keys, of the others; then the next vector's
            const bool is_pair = step + 1 < kVectors;
            if (is_pair) {
                load_transposed_matrices(packed, value.pair(step / 2));
            } else {
                load_two_transposed_matrices(packed, value.pair(step / 2));
            }
#pragma unroll
            for (int i = 0; i < (is_pair ? 2 : 1); ++i) {
                unsigned dims_by_keys[4];
                expand_fp8(packed[2 * i], dims_by_keys[0], dims_by_keys[1]);
                expand_fp8(packed[2 * i + 1], dims_by_keys[2], dims_by_keys[3]);
                function(step + i, dims_by_keys);
            }
        }
    }
}

}  // namespace llama_te::attention
