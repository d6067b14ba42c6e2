// SwiGLU of many rows.
//
// Shapes: B rows, F features of the activation.

#pragma once

#include <cstdint>

namespace llama_te {

struct SwigluArguments {
    const char *input;  // bfloat16 [B, 2 F], gate, then up
    char *output;       // bfloat16 [B, F]
    std::int32_t rows;
    std::int32_t features;  // F, a multiple of 8
};

void swiglu_cuda(const SwigluArguments &arguments, int device, std::uintptr_t stream);

}  // namespace llama_te
