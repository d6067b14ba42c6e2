// The elements of tensors as numbers of the host, with the roundings of the GPU.

#pragma once

#include <cstdint>
#include <cstring>

#include "include/element.h"

namespace llama_te {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Float32 {
    float value;

    double get() const {
        return value;
    }
    void set(double wide) {
        value = static_cast<float>(wide);
    }
};

struct BFloat16 {
    std::uint16_t bits;

    double get() const {
        return float_of(static_cast<std::uint32_t>(bits) << 16);
    }
    void set(double wide) {
        const std::uint32_t whole = bits_of(static_cast<float>(wide));
        const bool is_nan = (whole & 0x7fffffffU) > 0x7f800000U;  // rounding could turn a NaN into an infinity
        bits = static_cast<std::uint16_t>(is_nan ? (whole >> 16) | 0x40U
                                                 : (whole + 0x7fffU + ((whole >> 16) & 1U)) >> 16);
    }
};

struct Float16 {
    std::uint16_t bits;

    double get() const {
        const std::uint32_t sign = (bits & 0x8000U) << 16;
        const std::uint32_t exponent = (bits >> 10) & 0x1fU;
        const std::uint32_t mantissa = bits & 0x3ffU;
        if (exponent == 0) {
            const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
            return float_of(bits_of(magnitude) | sign);
        }
        const std::uint32_t wide = exponent == 0x1fU ? 0xffU : exponent + 112;
        return float_of(sign | wide << 23 | mantissa << 13);
    }
    void set(double value) {
        const std::uint32_t whole = bits_of(static_cast<float>(value));
        const std::uint32_t sign = (whole >> 16) & 0x8000U;
        std::uint32_t magnitude = whole & 0x7fffffffU;
        if (magnitude >= 0x47800000U) {  // 65536 and beyond
            magnitude = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;
        } else if (magnitude < 0x38800000U) {
            // Below 2^-14 half precision has multiples of 2^-24, to which float32's own addition of 0.5 rounds.
            magnitude = bits_of(float_of(magnitude) + 0.5F) - 0x3f000000U;
        } else {
            magnitude = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
        }
        bits = static_cast<std::uint16_t>(sign | magnitude);
    }
};

struct E4M3 {
    std::uint8_t bits;

    double get() const {
        const std::uint32_t sign = (bits & 0x80U) << 24;
        const std::uint32_t magnitude = bits & 0x7fU;
        if (magnitude == 0x7fU) {
            return float_of(sign | 0x7fc00000U);
        }
        if (magnitude < 8) {
            const float small = static_cast<float>(magnitude) * 0x1p-9F;
            return float_of(bits_of(small) | sign);
        }
        return float_of(sign | ((magnitude << 20) + (120U << 23)));
    }
    // Numbers beyond the greatest, 448, become 448. There is one NaN, as on the GPU.
    void set(double value) {
        const std::uint32_t whole = bits_of(static_cast<float>(value));
        std::uint32_t sign = (whole >> 24) & 0x80U;
        std::uint32_t magnitude = whole & 0x7fffffffU;
        if (magnitude > 0x7f800000U) {
            sign = 0;
            magnitude = 0x7fU;
        } else if (magnitude < 0x3c800000U) {
            // Below 2^-6 e4m3 has multiples of 2^-9, to which float32's own addition of 2^14 rounds.
            magnitude = bits_of(float_of(magnitude) + 0x1p14F) - bits_of(0x1p14F);
        } else {
            magnitude = (magnitude - (120U << 23) + 0x7ffffU + ((magnitude >> 20) & 1U)) >> 20;
            magnitude = magnitude < 0x7eU ? magnitude : 0x7eU;
        }
        bits = static_cast<std::uint8_t>(sign | magnitude);
    }
};

template <ElementType kElement>
struct Number;
template <>
struct Number<ElementType::kBFloat16> {
    using Type = BFloat16;
};
template <>
struct Number<ElementType::kFloat16> {
    using Type = Float16;
};
template <>
struct Number<ElementType::kFloat32> {
    using Type = Float32;
};

}  // namespace llama_te
