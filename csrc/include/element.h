// The numbers that caches and activations consist of.

#pragma once

#include "dispatch.h"
#include "integer.h"

namespace llama_te {

enum class ElementType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };
using Elements = Values<ElementType::kBFloat16, ElementType::kFloat16, ElementType::kFloat32>;

LLAMA_TE_HOST_DEVICE constexpr int element_bytes(ElementType element) {
    return element == ElementType::kFloat32 ? 4 : 2;
}

// The widest access of one thread. Addresses and strides are multiples of it.
constexpr int kVectorBytes = 16;

// Rows of a kernel that has one row of blocks for each: the most blocks of a grid's second dimension.
constexpr int kMaxGridRows = 65535;

}  // namespace llama_te
