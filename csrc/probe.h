// Whether this build's CUDA code runs on the GPU at hand.

#pragma once

#include <string>

namespace llama_te {

// The CUDA toolkit compiled with, "13.0".
std::string cuda_version();

// Empty where an empty kernel runs on the current device, else CUDA's reason.
std::string cuda_problem();

}  // namespace llama_te
