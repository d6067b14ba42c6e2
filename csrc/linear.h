// Products of a few rows of activations with a weight, and what surrounds them in a decoder layer.
//
// Shapes: B rows, K input features, N output features.

#pragma once

#include <cstdint>
#include <vector>

namespace llama_te {

enum class WeightType : int { kBFloat16 = 0, kFloat8E4M3 = 1 };

// Rows of activations that `linear_cuda` takes.
constexpr int kMaxLinearRows = 32;

// Products that one launch of it does.
constexpr int kMaxProducts = 4;

// A row of the weight has a multiple of this many bytes, which TMA swizzles, and the weight a multiple of this many rows.
constexpr int kLinearRowBytes = 128;
constexpr int kLinearOutFeatures = 16;

struct LinearArguments {
    const char *input;        // bfloat16 [B, K]
    const char *weight;       // [N, K]
    const float *scale;       // of an FP8 weight: what its values are multiplied by; null: 1
    const char *norm_weight;  // bfloat16 [K], or null: no RMSNorm
    float epsilon;            // of the RMSNorm
    const char *residual;     // bfloat16 [B, N], added to the product, or null
    char *output;             // bfloat16 [B, N]; with swiglu [B, N / 2]
    float *partials;          // memory for `splits` of each tile
    std::int32_t *tickets;    // one for each tile; 0 before and after
    std::int32_t rows;          // B
    std::int32_t in_features;   // K, a multiple of 64
    std::int32_t out_features;  // N, a multiple of 8
    WeightType weight_type;
    bool swiglu;  // the weight's first half is the gate's
};

// Floats of `partials` and number of `tickets` that are enough on this GPU, whatever the weight.
std::int64_t linear_partials(int device);
std::int64_t linear_tickets(int device);

// Does the products one after the other; each may read what those before it have written. They have as many rows and
// weights of one type, and share `partials` and `tickets`.
void linear_cuda(const std::vector<LinearArguments> &products, int device, std::uintptr_t stream);

}  // namespace llama_te
