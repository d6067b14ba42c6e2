// The order of logits as integers. The greatest integer is the same in whatever order they are compared.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "include/integer.h"
#include "sampling/run.h"

namespace llama_te {

constexpr std::int64_t kNoToken = -1;  // of a row with NaN, or without a finite greatest logit

LLAMA_TE_HOST_DEVICE inline std::uint32_t float_bits(float number) {
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

// An integer with the order of float32 numbers; -0 and 0 are equal, and NaN is above all numbers.
LLAMA_TE_HOST_DEVICE inline std::uint32_t ordered(float number) {
    if (number != number) {
        return 0xffffffffU;
    }
    const std::uint32_t bits = float_bits(number + 0.0F);  // turns -0 into 0
    return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

// The number that `ordered` turned into the integer.
LLAMA_TE_HOST_DEVICE inline float number_of(std::uint32_t ordered) {
    const std::uint32_t bits = ordered & 0x80000000U ? ordered & 0x7fffffffU : ~ordered;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// A number and its token. Of two ranks the greater one has the greater number, or the lower token of equal numbers.
using Rank = std::uint64_t;

LLAMA_TE_HOST_DEVICE inline Rank rank_of(float number, std::int32_t token) {
    return static_cast<Rank>(ordered(number)) << 32 | (0xffffffffU - static_cast<std::uint32_t>(token));
}

LLAMA_TE_HOST_DEVICE inline std::uint32_t key_of(Rank rank) {
    return static_cast<std::uint32_t>(rank >> 32);
}

// The rank's token, unless the number is NaN or infinite, or the rank is 0.
LLAMA_TE_HOST_DEVICE inline std::int64_t token_of(Rank rank) {
    const std::uint32_t key = key_of(rank);
    const bool is_finite = key >= 0x00800000U && key < 0xff800000U;  // from the lowest to the greatest float32
    return is_finite ? static_cast<std::int64_t>(0xffffffffU - static_cast<std::uint32_t>(rank)) : kNoToken;
}

// The greatest logit that one thread has seen, in the order of ranks. The thread sees the lower token first.
class Best {
public:
    LLAMA_TE_HOST_DEVICE void see(const Run &run) {
        const float greatest = run.greatest();
        if (!(greatest <= logit_) && logit_ == logit_) {  // NaN stays
            logit_ = greatest;
            token_ = run.first;
            for (int i = kRun - 1; i >= 0; --i) {
                token_ = run.logits[i] == greatest ? run.first + i : token_;
            }
        }
    }

    LLAMA_TE_HOST_DEVICE float logit() const {
        return logit_;
    }

    // 0 if it has seen no token above -inf.
    LLAMA_TE_HOST_DEVICE Rank rank() const {
        return token_ < 0 ? 0 : rank_of(logit_, token_);
    }

private:
    float logit_ = -HUGE_VALF;
    std::int32_t token_ = -1;
};

}  // namespace llama_te
