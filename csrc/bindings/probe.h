// Whether this build's CUDA code runs on the current GPU.

#pragma once

#include <string>

namespace llama_te {

// The CUDA toolkit that compiled it, such as "13.0".
std::string cuda_version();

// Runs an empty kernel on the current device. Returns CUDA's error message, empty where the kernel runs.
std::string cuda_problem();

}  // namespace llama_te
