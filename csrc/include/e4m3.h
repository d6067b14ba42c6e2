// FP8 caches: keys and values as e4m3, with one scale for each head of each token.
//
// A number is e4m3 * 2^(scale - 127). The scale is the exponent of E8M0, the format of OCP's MX, in one byte. It is the
// smallest power of two with which the head's greatest magnitude is at most 448, the greatest e4m3. A power of two makes
// every cached number a bfloat16 number, so all readers of a cache see the same keys and values.
//
// e4m3 has no infinity, so a head with a NaN or an infinity becomes NaN as a whole: its bytes are NaN and its scale is
// E8M0's NaN. No other head has bytes that are NaN. So kernels need only look at the scale.

#pragma once

#include <cstdint>

#include "integer.h"

namespace llama_te {

constexpr std::uint32_t kScaleOfOne = 127;
constexpr std::uint32_t kScaleOfNaN = 255;
// The smallest e4m3 above 0, 2^-9, times this scale is the smallest normal number, 2^-126.
constexpr std::uint32_t kLeastScale = 10;
// The greatest e4m3 times this scale is 1.75 * 2^127, a bfloat16 number. Greater numbers become this one.
constexpr std::uint32_t kGreatestScale = 246;

// The scale of a head, from the bits of its greatest magnitude as float32. The bits of magnitudes have the order of the
// magnitudes, with infinity and then NaN at the end.
LLAMA_TE_HOST_DEVICE constexpr std::uint32_t scale_of_greatest(std::uint32_t greatest) {
    if (greatest == 0) {
        return kScaleOfOne;
    }
    if (greatest >= 0x7f800000U) {
        return kScaleOfNaN;
    }
    // 448 is 1.75 * 2^8. The addition carries into the exponent where the mantissa is above 1.75.
    const std::uint32_t exponent = (greatest + 0x1fffffU) >> 23;
    return exponent < kLeastScale + 8      ? kLeastScale
           : exponent > kGreatestScale + 8 ? kGreatestScale
                                           : exponent - 8;
}

// The bits of 2^(scale - 127) as float32; NaN for the scale of NaN, and 0 for the scale of cleared memory, 0.
LLAMA_TE_HOST_DEVICE constexpr std::uint32_t bits_of_scale(std::uint32_t scale) {
    return scale << 23 | (scale + 1) >> 8 << 22;
}

// The bits of 2^(127 - scale) as float32, for scales of at least kLeastScale; NaN for the scale of NaN.
LLAMA_TE_HOST_DEVICE constexpr std::uint32_t bits_of_inverse_scale(std::uint32_t scale) {
    return (254 - scale) << 23 | (scale + 1) >> 8 << 22;
}

}  // namespace llama_te
