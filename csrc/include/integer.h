// Integer arithmetic for host and device code.

#pragma once

#ifdef __CUDACC__
#define LLAMA_TE_HOST_DEVICE __host__ __device__
#else
#define LLAMA_TE_HOST_DEVICE
#endif

namespace llama_te {

template <typename Integer>
LLAMA_TE_HOST_DEVICE constexpr Integer divide_up(Integer dividend, Integer divisor) {
    return dividend / divisor + (dividend % divisor != 0 ? 1 : 0);
}

template <typename Integer>
LLAMA_TE_HOST_DEVICE constexpr Integer round_up(Integer value, Integer multiple) {
    return divide_up(value, multiple) * multiple;
}

}  // namespace llama_te
