// Products of a few rows of activations with a weight: arguments, limits and entry points.
//
// Shapes: B rows, K input features, N output features.

#pragma once

#include <cstdint>
#include <vector>

#include "include/dispatch.h"

namespace llama_te {

enum class WeightType : int { kBFloat16 = 0, kFloat8E4M3 = 1 };
using WeightTypes = Values<WeightType::kBFloat16, WeightType::kFloat8E4M3>;

// Rows of activations.
constexpr int kMaxLinearRows = 32;

// Products of one launch.
constexpr int kMaxProducts = 4;

// TMA swizzles boxes of this many bytes: a row of the weight is a multiple of it.
constexpr int kLinearRowBytes = 128;
// The weight has a multiple of this many rows, so that each half of SwiGLU consists of whole tensor core products.
constexpr int kLinearOutFeatures = 16;

struct Product {
    const char *input;        // bfloat16 [B, K]
    const char *weight;       // [N, K]
    const float *scale;       // the factor of an FP8 weight's values; null: 1
    const char *norm_weight;  // bfloat16 [K], or null: no RMSNorm
    float epsilon;            // of the RMSNorm
    const char *residual;     // bfloat16 [B, N], added to the product, or null
    char *output;             // bfloat16 [B, N]; with swiglu [B, N / 2]
    float *partials;            // partial sums of tiles that several blocks share
    std::int32_t *semaphores;   // one for each tile; 0 before and after
    std::int32_t rows;          // B
    std::int32_t in_features;   // K
    std::int32_t out_features;  // N
    WeightType weight_type;
    bool swiglu;  // the weight's first half is the gate's
};

// Floats of `partials` and number of `semaphores` that every launch on this GPU can do with.
std::int64_t linear_partials(int device);
std::int64_t linear_semaphores(int device);

// Computes the products one after the other; each may read what earlier ones have written. They have the same number of
// rows and the same type of weight, and share `partials` and `semaphores`. Does not wait for the GPU. `stream` is a
// cudaStream_t of `device`. Throws std::runtime_error where the launch fails.
void linear_cuda(const std::vector<Product> &products, int device, std::uintptr_t stream);

}  // namespace llama_te
