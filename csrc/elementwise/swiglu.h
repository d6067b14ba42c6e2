// SwiGLU of many rows, with rounding to FP8 behind it.
//
// Shapes: B rows, F features of the activation.

#pragma once

#include <cstdint>

#include "elementwise/quantize_rows.h"

namespace llama_te {

struct SwigluArguments {
    const char *input;         // bfloat16 [B, 2 F], gate, then up
    const float *input_scale;  // [B], multiplies the rows of `input`, or null
    char *output;              // bfloat16 [B, F], or float8_e4m3fn
    Quantization to;           // of FP8
    std::int32_t rows;
    std::int32_t features;  // F, a multiple of 8, or of 16 for FP8
};

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
