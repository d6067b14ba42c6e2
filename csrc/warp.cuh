// What the threads of a warp do together.

#pragma once

namespace llama_te {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;

// Four matrices of 8 rows of 16 bytes in shared memory, of which a lane names a row and gets the fragments.
__device__ inline void load_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
}

}  // namespace llama_te
