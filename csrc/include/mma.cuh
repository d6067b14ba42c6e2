// Products of a warp on tensor cores: fragments from shared memory, and D[16, 8] += A[16, 16] B[16, 8].

#pragma once

#include "vector.cuh"
#include "warp.cuh"

namespace llama_te {

// Loads the fragments of four matrices of 8 rows of 16 bytes. Each lane passes the address of one row.
__device__ inline void load_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
}

// The same of two matrices: the first 16 lanes pass addresses.
__device__ inline void load_two_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragments[0]), "=r"(fragments[1])
                 : "r"(row)
                 : "memory");
}

__device__ inline void load_two_transposed_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragments[0]), "=r"(fragments[1])
                 : "r"(row)
                 : "memory");
}

__device__ inline void load_transposed_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
}

// Transposes an 8 x 8 matrix whose fragments the warp's lanes hold.
__device__ inline unsigned transpose_matrix(unsigned fragment) {
    unsigned result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
    return result;
}

template <ElementType kElement>
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static_assert(kElement == ElementType::kBFloat16 || kElement == ElementType::kFloat16);
    if constexpr (kElement == ElementType::kBFloat16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace llama_te
