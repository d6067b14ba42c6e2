// RMSNorm of many rows, with a residual's addition before it and rounding to FP8 behind it.
//
// Shapes: B rows, K features.

#pragma once

#include <cstdint>

#include "elementwise/quantize_rows.h"

namespace llama_te {

struct RmsNormArguments {
    char *hidden;        // bfloat16 [B, K]; gets the sum if there is an addend
    const char *addend;         // bfloat16 [B, K], added to `hidden` before the norm, or null
    const float *addend_scale;  // [B], multiplies the rows of `addend`, or null
    const char *weight;         // bfloat16 [K]
    float epsilon;
    char *output;     // bfloat16 [B, K], or float8_e4m3fn
    Quantization to;  // of FP8
    std::int32_t rows;
    std::int32_t features;  // K, a multiple of 8, or of 16 for FP8
};

void rms_norm_cuda(const RmsNormArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
