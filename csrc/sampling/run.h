// Tokens side by side, which one thread sees at once: it reads their logits in vectors.

#pragma once

#include <cstdint>

#include "include/integer.h"

namespace llama_te {

constexpr int kRun = 8;  // 16-bit logits of the widest access of a thread

// The place of the lowest bit that is set, of a number that is not 0.
LLAMA_TE_HOST_DEVICE inline int lowest_bit(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
}

struct Run {
    std::int32_t first;  // a token, a multiple of kRun
    float logits[kRun];  // -inf past the end of the vocabulary, where it changes no result

    // The logit in a place that only the running program knows. Registers have no index, and a loop
    // that is unrolled late becomes one of memory.
    LLAMA_TE_HOST_DEVICE float logit(int place) const {
        float found = logits[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int i = 1; i < kRun; ++i) {
            found = i == place ? logits[i] : found;
        }
        return found;
    }

    // The greatest logit, or NaN if one of them is NaN.
    LLAMA_TE_HOST_DEVICE float greatest() const {
        float found = logits[0];
        for (int i = 1; i < kRun; ++i) {
#ifdef __CUDA_ARCH__
            asm("max.NaN.f32 %0, %0, %1;" : "+f"(found) : "f"(logits[i]));
#else
            found = !(logits[i] <= found) && found == found ? logits[i] : found;
#endif
        }
        return found;
    }
};

}  // namespace llama_te
