// Sizes and masks of a warp.

#pragma once

namespace llama_te {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;

}  // namespace llama_te
