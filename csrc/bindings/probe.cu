#include "probe.h"

#include <cuda_runtime.h>

namespace llama_te {

namespace {

__global__ void empty_kernel() {}

}  // namespace

std::string cuda_version() {
    return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string cuda_problem() {
    empty_kernel<<<1, 1>>>();
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) {
        error = cudaDeviceSynchronize();
    }
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace llama_te
