// What lies between the products of a layer, for more rows than `linear_cuda` takes: RMSNorm, with the residual's
// addition ahead of it, and SwiGLU.
//
// Shapes: B rows, K features, F features of the activation.

#pragma once

#include <cstdint>

namespace llama_te {

struct RmsNormArguments {
    char *hidden;        // bfloat16 [B, K]; with an addend, gets the sum
    const char *addend;  // bfloat16 [B, K], added to `hidden` ahead of the norm, or null
    const char *weight;  // bfloat16 [K]
    float epsilon;
    char *output;  // bfloat16 [B, K]
    std::int32_t rows;
    std::int32_t features;  // K, a multiple of 8
};

struct SwigluArguments {
    const char *input;  // bfloat16 [B, 2 F], gate, then up
    char *output;       // bfloat16 [B, F]
    std::int32_t rows;
    std::int32_t features;  // F, a multiple of 8
};

void rms_norm_cuda(const RmsNormArguments &arguments, int device, std::uintptr_t stream);
void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
