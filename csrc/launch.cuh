// What the kernels' launches share.

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
        cudaGetLastError();  // not to be reported a second time by somebody else's check
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

// Makes `device` current, as the stream's device must be, and the one before it again at the end.
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

inline int multiprocessors(int device) {
    static std::atomic<int> known[64];  // a launch should not ask the driver each time
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

// How many blocks of how many threads, and the shared memory that a block is given at its launch.
struct LaunchShape {
    dim3 grid;
    dim3 block;
    int shared_bytes = 0;
};

// Launches a kernel that may begin before the one ahead of it on the stream has ended, and waits for that itself
// (programmatic dependent launch).
template <typename... Arguments>
void launch_overlapping(void (*kernel)(Arguments...), const LaunchShape &shape, cudaStream_t stream, const char *name,
                        const Arguments &...arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace llama_te
