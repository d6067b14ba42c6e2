// Launches of kernels, and how a kernel overlaps with its neighbours on a stream (programmatic dependent launch).

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "llama_te needs compute capability 9.0 or later"
#endif

namespace llama_te {

inline void check_cuda(cudaError_t error, const char *what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // clears the error, so that no later check reports it again
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Makes `device`, to which the stream belongs, the current device, and restores the previous one at the end.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = before_ != device;
        if (changed_) {
            check_cuda(cudaSetDevice(device), "cudaSetDevice");
        }
    }
    ~DeviceGuard() {
        if (changed_) {
            cudaSetDevice(before_);
        }
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

// Returns the number of a GPU's multiprocessors. It is cached: a launch should not ask the driver each time.
inline int multiprocessors(int device) {
    static std::atomic<int> known[64];
    if (device < 0 || device >= 64) {
        throw std::runtime_error("there is no GPU " + std::to_string(device));
    }
    int count = known[device].load(std::memory_order_relaxed);
    if (count == 0) {
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
        known[device].store(count, std::memory_order_relaxed);
    }
    return count;
}

struct LaunchShape {
    dim3 grid;
    dim3 block;
    int shared_bytes = 0;  // dynamic shared memory of a block
    int cluster = 1;       // blocks, side by side in the grid's first dimension, that read each other's shared memory
};

// Launches a kernel that may start before the previous kernel on the stream has ended, and that calls
// `wait_for_previous_kernel` itself.
template <typename... Arguments>
void launch_overlapping(void (*kernel)(Arguments...), const LaunchShape &shape, cudaStream_t stream, const char *name,
                        const Arguments &...arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = attributes;
    config.numAttrs = shape.cluster > 1 ? 2 : 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Blocks until the previous kernel on the stream has ended: then everything it wrote can be read.
__device__ inline void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel on the stream start once every block of this one has called it or ended.
__device__ inline void allow_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;");
}

}  // namespace llama_te
