// TMA: barriers in shared memory, copies that arrive at them, and the tensor maps that describe what is copied.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace llama_te {

__device__ inline unsigned shared_address(const void *shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// --- barriers

__device__ inline void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// The thread that has initialized barriers calls it before it tells other threads.
__device__ inline void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void arrive_and_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void wait(unsigned barrier, unsigned phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// A stage of a ring of stages, and the parity of how often the ring was used: barriers have completed as many phases.
struct PipelineState {
    int stage = 0;
    unsigned phase = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// --- copies to shared memory

// Copies the box of a map of three dimensions that starts at (0, row, box).
__device__ inline void tma_load_3d(unsigned to, const CUtensorMap &map, int row, int box, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(&map), "r"(0), "r"(row), "r"(box), "r"(barrier)
        : "memory");
}

// Copies the box of a map of five dimensions that starts at (0, place, 0, head, block).
__device__ inline void tma_load_5d(unsigned to, const CUtensorMap &map, int block, int place, int head,
                                   unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, "
        "%6}], [%7];" ::"r"(to),
        "l"(&map), "r"(0), "r"(place), "r"(0), "r"(head), "r"(block), "r"(barrier)
        : "memory");
}

// Copies contiguous memory.
__device__ inline void tma_load_bulk(unsigned to, const char *from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Copies a vector of 16 bytes from the L2 cache, without TMA and without waiting.
__device__ inline void copy_vector(unsigned to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Arrives at a barrier when all vectors that this thread has copied so far are there.
__device__ inline void arrive_after_copies(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Orders accesses of threads to shared memory before TMA's.
__device__ inline void fence_before_tma() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for all memory.
__device__ inline void fence_global_before_tma() {
    asm volatile("fence.proxy.async;" ::: "memory");
}

// --- tensor maps

// A box of the map is one copy. Elements of a box outside of the tensor are filled with zeros.
inline CUtensorMap make_tensor_map(CUtensorMapDataType type, int rank, const void *data, const cuuint64_t *sizes,
                                   const cuuint64_t *strides, const cuuint32_t *box, CUtensorMapSwizzle swizzle) {
    static const auto encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
                   "cudaGetDriverEntryPointByVersion");
        if (result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    const cuuint32_t steps[] = {1, 1, 1, 1, 1};
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, static_cast<cuuint32_t>(rank), const_cast<void *>(data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
    }
    return map;
}

}  // namespace llama_te
