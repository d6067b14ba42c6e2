// FP8 of many rows, each with a scale of its own.
//
// Shapes: B rows, K features.

#pragma once

#include <cstdint>

namespace llama_te {

constexpr float kGreatestE4M3 = 448.0F;
constexpr float kLeastGreatest = 0x1p-116F;  // of a row that does not become zeros: 448 over it is finite

// The scales of rows in FP8.
struct Quantization {
    const float *factor;  // [1], multiplies the scales, or null
    float *scales;        // [B]: a row is its numbers times its scale without the factor; null of rows in bfloat16
};

struct QuantizeRowsArguments {
    const char *input;  // bfloat16 [B, K]
    char *output;       // float8_e4m3fn [B, K]
    Quantization to;
    std::int32_t rows;
    std::int32_t features;  // K, a multiple of 16
};

void quantize_rows_cuda(const QuantizeRowsArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
