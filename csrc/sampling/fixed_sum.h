// Sums of probabilities as integers, which are the same in whatever order they are added.

#pragma once

#include <cstdint>

#include "include/integer.h"
#include "sampling/order.h"
#include "sampling/run.h"

namespace llama_te {

// A sum of numbers from 0 to 1, each rounded down to a multiple of 2^-kBits.
template <int kBits>
class FixedSum {
    static_assert(kBits % 2 == 0 && kBits <= 44);

public:
    LLAMA_TE_HOST_DEVICE void add(const float (&numbers)[kRun]) {
#ifdef __CUDA_ARCH__
        // A GPU converts few numbers at once. But a sum with 2^23 has its integer part in its low bits. This takes two
        // halves of each number's bits, and the bits of 2^23 off the sums of a run.
        constexpr float kWhole = 0x1p23F;
        constexpr std::uint32_t kWholes = kRun * 0x4b000000U;
        constexpr int kHalf = kBits / 2;
        constexpr float kScale = 1 << kHalf;
        std::uint32_t high = 0;
        std::uint32_t low = 0;
#pragma unroll
        for (const float number : numbers) {
            const float half = __fmaf_rz(number, kScale, kWhole);
            const float rest = __fmaf_rn(number, kScale, kWhole - half);  // exact, from 0 to 1
            high += float_bits(half);
            low += float_bits(__fmaf_rz(rest, kScale, kWhole));
        }
        units_ += (static_cast<std::int64_t>(high - kWholes) << kHalf) + (low - kWholes);
#else
        for (const float number : numbers) {
            units_ += static_cast<std::int64_t>(number * static_cast<float>(std::int64_t{1} << kBits));
        }
#endif
    }

    LLAMA_TE_HOST_DEVICE void merge(const FixedSum &other) {
        units_ += other.units_;
    }

    LLAMA_TE_HOST_DEVICE std::int64_t units() const {
        return units_;
    }

private:
    std::int64_t units_ = 0;
};

}  // namespace llama_te
