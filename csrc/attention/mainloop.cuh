// The mainloop: a warp's online softmax over its tiles of keys, and its weighted sum of values.
//
// The products run on tensor cores with keys, or dimensions of values, as the 16 rows of a fragment and query heads as
// its 8 columns: scores^T = keys query^T and output^T = values^T weights^T. So up to 8 query heads cost as much as one,
// and a thread's numbers of the scores, of the softmax and of the output belong to the same 2 heads.

#pragma once

#include "fragments.cuh"
#include "include/e4m3.h"
#include "shared_storage.cuh"

namespace llama_te::attention {

// 2 to the power of `x`, with a relative error of 2^-22.
__device__ inline float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The state of the online softmax. Scores are times log2(e). A thread has heads 2 (lane % 4) and the next of each head
// tile, and dimensions lane / 4 and 8 more of each 16; with an FP8 cache dimensions 2 (lane / 4) and the next, and the sums
// of values are times 2^-60.
template <ElementType kElement, int kHeadDim, int kHeadTiles, bool kFp8>
struct Softmax {
    using Shared = SharedStorage<kHeadDim, kHeadTiles, kFp8>;
    static_assert(kElement == ElementType::kBFloat16 || !kFp8);

    float most[kHeadTiles][2];
    float sum[kHeadTiles][2];  // of this thread's keys
    float output[kHeadTiles][Shared::kSteps][4];

    __device__ Softmax() {
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
            most[t][0] = most[t][1] = -INFINITY;
            sum[t][0] = sum[t][1] = 0;
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                output[t][step][0] = output[t][step][1] = output[t][step][2] = output[t][step][3] = 0;
            }
        }
    }

    // Adds one tile, of which the first `keys` places count. `scales` are those of an FP8 tile.
    __device__ void add_tile(unsigned stage, const std::uint8_t *scales, int keys, float scale,
                             const unsigned (&query)[kHeadTiles][Shared::kSteps][2]) {
        const int lane = threadIdx.x % kWarp;
        // Two sets of accumulators, so that a product need not wait for the one before it.
        float scores[kHeadTiles][2][4] = {};
        for_keys<kHeadDim, kFp8>(stage, [&](int step, const unsigned (&keys_by_dims)[4]) {
#pragma unroll
            for (int t = 0; t < kHeadTiles; ++t) {
                multiply_add<kElement>(scores[t][step % 2], keys_by_dims, query[t][step][0], query[t][step][1]);
            }
        });
        // Of keys lane / 4 and 8 more. The sum of the weights takes them as they are: only what multiplies a value takes its
        // scale, which is a power of two and so adds no rounding.
        float key_scale[2];
        float value_scale[2];
        if constexpr (kFp8) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                key_scale[i] = __uint_as_float(bits_of_scale(scales[lane / 4 + i * 8]));
                value_scale[i] = __uint_as_float(bits_of_scale(scales[kTileKeys + lane / 4 + i * 8])) * kFactorOfSum;
            }
        }

        unsigned weights[kHeadTiles][2];
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
            float score[4];  // keys lane / 4 and 8 more, by two heads
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] = (scores[t][0][i] + scores[t][1][i]) * scale;
                if constexpr (kFp8) {
                    score[i] *= key_scale[i / 2];
                }
                if (keys < kTileKeys && lane / 4 + i / 2 * 8 >= keys) {
                    score[i] = -INFINITY;
                }
            }
            rescale(t, fmaxf(score[0], score[2]), fmaxf(score[1], score[3]));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] = power_of_two(score[i] - most[t][i % 2]);
                sum[t][i % 2] += score[i];
                if constexpr (kFp8) {
                    score[i] *= value_scale[i / 2];
                }
            }
            weights[t][0] = transpose_matrix(Pair<kElement>::pack(score[0], score[1]));
            weights[t][1] = transpose_matrix(Pair<kElement>::pack(score[2], score[3]));
        }

        for_values<kHeadDim, kFp8>(stage + Shared::kTileBytes, [&](int step, const unsigned (&dims_by_keys)[4]) {
#pragma unroll
            for (int t = 0; t < kHeadTiles; ++t) {
                multiply_add<kElement>(output[t][step], dims_by_keys, weights[t][0], weights[t][1]);
            }
        });
    }

    // Raises the maximum and rescales the sums. After a few tiles a new maximum is rare, so the warp first asks whether
    // there is one; the result is the same without that.
    __device__ void rescale(int t, float first, float second) {
        if (!__any_sync(kWholeWarp, first > most[t][0] || second > most[t][1])) {
            return;
        }
#pragma unroll
        for (int distance = 4; distance < kWarp; distance *= 2) {
            first = fmaxf(first, __shfl_xor_sync(kWholeWarp, first, distance));
            second = fmaxf(second, __shfl_xor_sync(kWholeWarp, second, distance));
        }
        const float new_most[2] = {fmaxf(most[t][0], first), fmaxf(most[t][1], second)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // A head whose scores are all -inf so far has nothing to scale, and -inf - -inf is NaN.
            const float factor = most[t][i] == new_most[i] ? 1.0F : power_of_two(most[t][i] - new_most[i]);
            most[t][i] = new_most[i];
            sum[t][i] *= factor;
#pragma unroll
            for (int step = 0; step < Shared::kSteps; ++step) {
                output[t][step][i] *= factor;
                output[t][step][i + 2] *= factor;
            }
        }
    }

    // Writes the result over the warp's own stages, which the warp has read to the end.
    __device__ void store(Shared &shared, bool valid) {
        const int lane = threadIdx.x % kWarp;
        const int warp = threadIdx.x / kWarp;
        float *const result = reinterpret_cast<float *>(shared.stages[warp]);
#pragma unroll
        for (int t = 0; t < kHeadTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int head = t * kColumns + lane % 4 * 2 + i;
                float whole = sum[t][i];
#pragma unroll
                for (int distance = 4; distance < kWarp; distance *= 2) {
                    whole += __shfl_xor_sync(kWholeWarp, whole, distance);
                }
                if (lane < 4) {
                    shared.statistics[warp][head] = make_float2(most[t][i], valid ? whole : kInvalid);
                }
#pragma unroll
                for (int step = 0; step < Shared::kSteps; ++step) {
                    float *const to = result + head * Shared::kResultFloats + step * 16;
                    if constexpr (kFp8) {
                        *reinterpret_cast<float2 *>(to + lane / 4 * 2) =
                            make_float2(output[t][step][i] * kFactorOfSum, output[t][step][i + 2] * kFactorOfSum);
                    } else {
                        to[lane / 4] = output[t][step][i];
                        to[lane / 4 + 8] = output[t][step][i + 2];
                    }
                }
            }
        }
    }
};

}  // namespace llama_te::attention
