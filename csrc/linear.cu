// y = x W^T for a few rows x, which is bound by how fast W streams from memory, with what surrounds it in a layer fused:
// RMSNorm of x before it, SwiGLU or the residual's addition behind it.
//
// A block works on tiles, 8 to 128 rows of W. One warp keeps a ring of stages filled by the copy engine: a stage has 128
// bytes of columns of W for each of the warps that share them, and x for these. It goes on to the next tile while the
// sums of one are put together, and, since W does not depend on the kernel before, begins before that has ended
// (programmatic dependent launch). The other warps multiply: each has columns of its own, and the sums are added in a
// fixed order at the tile's end. Where a tile's columns are split over blocks, the block that comes last adds up.
//
// Tensor cores multiply x (16 rows, m) with 8 rows of W (n) over 16 columns (k). Which columns these are does not matter
// as long as both agree, so a lane takes what lies in one vector of 16 bytes.
//
// RMSNorm is x * r * w with r, a number for each row, known only when the row has been seen: the product is taken of
// x * w, and multiplied by r. The sum of squares comes from the tensor cores too, as the diagonal of x x^T.

#include <cuda.h>
#include <cuda_bf16.h>

#include <initializer_list>

#include "launch.cuh"
#include "linear.h"

namespace llama_te {

namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // that multiply
constexpr int kThreads = kWarp * kWarps;
constexpr int kVector = 16;      // bytes
constexpr int kBoxBytes = 128;   // of one row of W: what the copy engine swizzles
constexpr int kBoxVectors = kBoxBytes / kVector;
constexpr int kTileRows = 8;     // rows of W of one tensor core product

struct Task {
    CUtensorMap weight;
    CUtensorMap input;
    LinearArguments a;
    int tiles;
    int splits;
    int *taken;  // how many items were taken
};

__device__ unsigned address_of(const void *shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// --- barriers of the ring and copies that arrive at them

__device__ void initialize(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void arrive_and_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ void wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A box of [columns of a box, rows, boxes], which lie one behind the other in shared memory.
__device__ void copy_boxes(unsigned to, const CUtensorMap &map, int row, int box, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(&map), "r"(0), "r"(row), "r"(box), "r"(barrier)
        : "memory");
}

__device__ void copy_bulk(unsigned to, const char *from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// --- arithmetic

// Four matrices of 8 rows of 16 bytes, of which a lane names a row and gets the fragments.
__device__ void load_matrices(unsigned (&fragments)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(row)
                 : "memory");
}

__device__ uint2 load_shared(unsigned from) {
    uint2 vector;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(vector.x), "=r"(vector.y) : "r"(from) : "memory");
    return vector;
}

__device__ unsigned multiply_pairs(unsigned a, unsigned b) {
    unsigned product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

__device__ void multiply_tile(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two pairs of bfloat16, of bytes 0 and 2 and of bytes 1 and 3, of four e4m3. Their exponent, 4 bits with a bias of 7,
// becomes the low bits of one of 8 bits with a bias of 127: that is the value times 2^-120, exactly.
__device__ void expand_fp8(unsigned four, unsigned &even, unsigned &odd) {
    even = ((four << 8) & 0x80008000U) | ((four << 4) & 0x07f007f0U);
    odd = (four & 0x80008000U) | ((four >> 4) & 0x07f007f0U);
}

// Half of that is taken back by x, which keeps all products far from the ends of the range, and half by the sum.
constexpr unsigned kInputFactor = 0x5d805d80;  // 2^60, twice
constexpr float kSumFactor = 1.152921504606846976e18F;  // 2^60

__device__ float round_bf16(float value) {
    return __bfloat162float(__float2bfloat16_rn(value));
}

__device__ float2 unpack(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U));
}

__device__ unsigned pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const unsigned *>(&pair);
}

__device__ float4 add(const float4 &a, const float4 &b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// kGroups: of 8 rows of x. kTile: of 8 rows of W. kSplit: warps that share a tile's rows; the others share columns.
template <WeightType kWeight, int kGroups, int kTile, int kSplit>
struct Plan {
    static constexpr int kElements = kWeight == WeightType::kBFloat16 ? 8 : 16;  // of a vector of W
    static constexpr int kBoxColumns = kElements * kBoxVectors;
    static constexpr int kBoxes = kWarps / kSplit;  // of a stage
    static constexpr int kRowTiles = kGroups == 1 ? 1 : kGroups / 2;  // of 16 rows of x
    static constexpr int kParts = kTile / kSplit;                     // of 8 rows of W that a warp has
    static constexpr int kWeightBytes = kBoxes * kTile * kTileRows * kBoxBytes;
    static constexpr int kInputs = kElements / 8;                 // boxes of x to one of W
    static constexpr int kInputBytes = kBoxes * kBoxColumns * 2;  // of a row of x
    static constexpr int kVectors = kRowTiles * kParts * kWarp;  // of 4 sums, of a warp
    static constexpr int kSumBytes = kWarps * kVectors * 16;
    static constexpr int kSquareBytes = kBoxes * 8 * kGroups * 4;
    // Sets of sums that take turns, where multiplications would wait for each other.
    static constexpr int kChains = kWeight == WeightType::kBFloat16 && kGroups == 1 ? 2 : 1;
    static constexpr int kMaxStages = 8;
    static constexpr int kHead = 1024;  // see Head; boxes begin at multiples of 1024 bytes
    // Beside a block for few rows fits one of the next kernel, which fills its ring meanwhile.
    static constexpr int kBudget = (kGroups == 1 && kWeight == WeightType::kBFloat16 ? 113 : 226) * 1024;
    static_assert(kTile % kSplit == 0 && kWarps % kSplit == 0);

    __host__ __device__ static int stage_bytes(int rows) {
        return (kWeightBytes + rows * kInputBytes + kInputBytes + 1023) / 1024 * 1024;
    }
    __host__ __device__ static int tail_bytes() {
        return kSumBytes + kSquareBytes;
    }
    static int stages(int rows) {
        const int fit = (kBudget - kHead - tail_bytes()) / stage_bytes(rows);
        return fit < kMaxStages ? fit : kMaxStages;
    }
};

struct Head {
    std::uint64_t full[8];   // barriers of the ring's stages
    std::uint64_t empty[8];
    int item[8];  // of a stage
    int box[8];   // its first
    bool last;
};

// Where the thread that copies is: a stage of an item, which is a split of a tile.
struct Place {
    int item;
    int tile;
    int box;
    int end;
};

template <WeightType kWeight, int kGroups, int kTile, int kSplit>
__global__ void __launch_bounds__(kThreads + kWarp, kGroups == 1 ? 2 : 1)
    linear_kernel(const __grid_constant__ Task task, const int stages) {
    using P = Plan<kWeight, kGroups, kTile, kSplit>;
    static_assert(sizeof(Head) <= P::kHead);
    extern __shared__ __align__(1024) char shared[];
    const LinearArguments &a = task.a;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int rows = a.rows;
    const bool norm = a.norm_weight != nullptr;
    const int items = task.tiles * task.splits;
    const int boxes = a.in_features / P::kBoxColumns;
    const int stage_bytes = P::stage_bytes(rows);
    Head &head = *reinterpret_cast<Head *>(shared);
    const unsigned full = address_of(head.full);
    const unsigned empty = address_of(head.empty);
    const unsigned ring = address_of(shared) + P::kHead;
    char *tail = shared + P::kHead + stages * stage_bytes;
    const auto split_begin = [&](int split) { return boxes * split / task.splits; };

    asm volatile("griddepcontrol.launch_dependents;");
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            initialize(full + i * 8, 1);
            initialize(empty + i * 8, kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == kWarps) {
        if (lane != 0) {
            return;
        }
        const auto scale_bytes = [&](int box) { return min(P::kBoxes, boxes - box) * P::kBoxColumns * 2; };
        const auto copy_weight = [&](const Place &place, int slot) {
            const unsigned to = ring + slot * stage_bytes;
            const unsigned barrier = full + slot * 8;
            head.item[slot] = place.item;
            head.box[slot] = place.box;
            // Boxes behind the last column count too: they are filled with zeros.
            arrive_and_expect(barrier, P::kWeightBytes + rows * P::kInputBytes + (norm ? scale_bytes(place.box) : 0));
            if (a.swiglu) {
                // The gate's rows, then those of the up projection for the same features.
                constexpr int kHalf = kTile / 2 * kTileRows;
                copy_boxes(to, task.weight, place.tile * kHalf, place.box, barrier);
                copy_boxes(to + P::kWeightBytes / 2, task.weight, a.out_features / 2 + place.tile * kHalf, place.box,
                           barrier);
            } else {
                copy_boxes(to, task.weight, place.tile * kTile * kTileRows, place.box, barrier);
            }
        };
        const auto copy_input = [&](int box, int slot) {
            const unsigned to = ring + slot * stage_bytes + P::kWeightBytes;
            const unsigned barrier = full + slot * 8;
            copy_boxes(to, task.input, 0, box * P::kInputs, barrier);
            if (norm) {
                copy_bulk(to + rows * P::kInputBytes, a.norm_weight + box * P::kBoxColumns * 2, scale_bytes(box),
                          barrier);
            }
        };
        // A block's first two items are given. Multiprocessors are not equally near to the memory, so whoever is done
        // then takes the next one: its number is asked for when an item begins, and looked at when that ends. Launches
        // that overlap share the counter, so nobody asks before the wait.
        constexpr int kUnknown = -1;
        const int blocks = gridDim.x;
        const int shared_out = max(items - 2 * blocks, 0);
        Place place = {static_cast<int>(blockIdx.x), 0, 0, 0};
        int taken = 0;
        const auto begin = [&] {
            place.tile = place.item / task.splits;
            const int split = place.item - place.tile * task.splits;
            place.box = split_begin(split);
            place.end = split_begin(split + 1);
        };
        const auto next = [&] {
            place.box += P::kBoxes;
            if (place.box < place.end) {
                return;
            }
            if (place.item < blocks) {
                place.item += blocks;
                begin();
            } else {
                place.item = shared_out > 0 ? kUnknown : items;
            }
        };
        const auto find_out = [&] {
            if (place.item != kUnknown) {
                return;
            }
            if (taken == shared_out + blocks - 1) {
                *task.taken = 0;  // every block has asked in vain: for a later launch
            }
            place.item = 2 * blocks + taken;
            if (place.item < items) {
                begin();
                taken = atomicAdd(task.taken, 1);
            }
        };
        begin();
        int filled = 0;
        for (; filled < stages && place.item != kUnknown && place.item < items; ++filled) {
            copy_weight(place, filled);
            next();
        }
        // What the kernel before wrote may be read from here on, and anything be written.
        asm volatile("griddepcontrol.wait;" ::: "memory");
        if (shared_out > 0) {
            taken = atomicAdd(task.taken, 1);
        }
        for (int slot = 0; slot < filled; ++slot) {
            copy_input(head.box[slot], slot);
        }
        int slot = filled == stages ? 0 : filled;
        unsigned parity = filled == stages ? 0 : 1;
        const auto advance = [&] {
            if (++slot == stages) {
                slot = 0;
                parity ^= 1;
            }
        };
        for (find_out(); place.item < items; advance(), find_out()) {
            wait(empty + slot * 8, parity);
            const int box = place.box;
            copy_weight(place, slot);
            copy_input(box, slot);
            next();
        }
        wait(empty + slot * 8, parity);
        head.item[slot] = items;  // there are no more
        arrive(full + slot * 8);
        return;
    }

    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int group = lane / 4;
    const int member = lane % 4;
    const int own_box = warp % P::kBoxes;
    const int first_part = warp / P::kBoxes * P::kParts;
    const bool sums_squares = norm && first_part == 0;
    // Where this lane's rows of matrices begin in a stage. The copy engine has exchanged vectors: in line l of its boxes
    // vector v is at v xor l % 8, so that what the 8 rows of a matrix hold is in different banks.
    const int in_matrix = lane % 8;
    const int matrix = lane / 8;
    const auto part_offset = [&](int part) {
        const int half = kTile / 2;
        const int place = !a.swiglu ? own_box * kTile + part
                          : part < half ? own_box * half + part
                                        : (P::kBoxes + own_box - 1) * half + part;
        return (place * kTileRows + in_matrix) * kBoxBytes + (matrix ^ in_matrix) * kVector;
    };
    constexpr int kLow = P::kParts / 2;  // with SwiGLU a warp may have parts of the gate, and as many of the other
    const int low_offset = part_offset(first_part);
    const int high_offset = part_offset(first_part + kLow) - kLow * kTileRows * kBoxBytes;
    int input_offset[P::kRowTiles];
#pragma unroll
    for (int j = 0; j < P::kRowTiles; ++j) {
        // Of the rows of x that are not there, others are taken: what comes of them is not looked at.
        if constexpr (kWeight == WeightType::kBFloat16) {
            const int row = min(j * 16 + (kGroups > 1 ? matrix % 2 * 8 : 0) + in_matrix, rows - 1);
            const int line = own_box * rows + row;
            const int vector = kGroups > 1 ? matrix / 2 : min(matrix, 1);
            input_offset[j] = P::kWeightBytes + line * kBoxBytes + (vector ^ line % 8) * kVector;
        }
    }
    const int scale_offset = P::kWeightBytes + rows * P::kInputBytes + own_box * P::kBoxColumns * 2;
    float4 *sums = reinterpret_cast<float4 *>(tail);
    float *squares = reinterpret_cast<float *>(tail + P::kSumBytes);
    const auto together = [] { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); };

    int slot = 0;
    unsigned parity = 0;
    while (true) {
        wait(full + slot * 8, parity);
        const int item = head.item[slot];
        if (item >= items) {
            break;
        }
        const int tile = item / task.splits;
        const int split = item - tile * task.splits;
        const int end = split_begin(split + 1);
        float sum[P::kChains][P::kRowTiles][P::kParts][4] = {};
        float square[kGroups][4] = {};
        // What the tile's end will add is on its way meanwhile, as far as it is this thread's first pair of sums.
        unsigned residual[2] = {};
        const auto load_residual = [&](int i) {
            const int feature = (tile * kTile + i / kWarp % kTile) * kTileRows + i % kWarp % 4 * 2;
            const int row = i / kWarp / kTile * 16 + i % kWarp / 4;
#pragma unroll
            for (int upper = 0; upper < 2; ++upper) {
                if (i < P::kRowTiles * kTile * kWarp && row + upper * 8 < rows && feature < a.out_features) {
                    residual[upper] = __ldcg(reinterpret_cast<const unsigned *>(
                        a.residual + (static_cast<std::int64_t>(row + upper * 8) * a.out_features + feature) * 2));
                }
            }
        };
        if (a.residual != nullptr) {
            load_residual(threadIdx.x);
        }
        for (int box = split_begin(split); box < end; box += P::kBoxes) {
            wait(full + slot * 8, parity);
            if (box + own_box < end) {
                const unsigned stage = ring + slot * stage_bytes;
                const auto weights_of = [&](int half, int part) {
                    return stage + ((part < kLow ? low_offset : high_offset) ^ half * 4 * kVector) +
                           part * kTileRows * kBoxBytes;
                };
                if constexpr (kWeight == WeightType::kBFloat16) {
                    // All that is needed is on its way before the first is used.
                    unsigned input[4][P::kRowTiles][4];
                    unsigned scale[2][4];
                    unsigned weight[2][P::kParts][4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
#pragma unroll
                        for (int j = 0; j < P::kRowTiles; ++j) {
                            load_matrices(input[k][j], stage + (input_offset[j] ^ k * 2 * kVector));
                        }
                    }
                    if (norm) {
                        load_matrices(scale[0], stage + scale_offset + matrix * kVector);
                        load_matrices(scale[1], stage + scale_offset + (4 + matrix) * kVector);
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
#pragma unroll
                        for (int part = 0; part < P::kParts; ++part) {
                            load_matrices(weight[half][part], weights_of(half, part));
                        }
                    }
                    if (norm) {
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            const unsigned lower = scale[k / 2][k % 2 * 2];
                            const unsigned upper = scale[k / 2][k % 2 * 2 + 1];
#pragma unroll
                            for (int j = 0; j < P::kRowTiles; ++j) {
                                unsigned(&x)[4] = input[k][j];
                                if (sums_squares) {
                                    if constexpr (kGroups == 1) {
                                        multiply_tile(square[0], x, x[0], x[1]);
                                    } else {
                                        multiply_tile(square[2 * j], x, x[0], x[2]);
                                        multiply_tile(square[2 * j + 1], x, x[1], x[3]);
                                    }
                                }
                                x[0] = multiply_pairs(x[0], lower);
                                x[2] = multiply_pairs(x[2], upper);
                                if constexpr (kGroups > 1) {
                                    x[1] = multiply_pairs(x[1], lower);
                                    x[3] = multiply_pairs(x[3], upper);
                                }
                            }
                        }
                    }
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
#pragma unroll
                        for (int part = 0; part < P::kParts; ++part) {
                            const unsigned(&columns)[4] = weight[k / 2][part];
#pragma unroll
                            for (int j = 0; j < P::kRowTiles; ++j) {
                                multiply_tile(sum[k % P::kChains][j][part], input[k][j], columns[k % 2 * 2],
                                              columns[k % 2 * 2 + 1]);
                            }
                        }
                    }
                } else {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        unsigned input[4][P::kRowTiles][4];
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            // A lane's 4 columns in a matrix of W, which are 8 bytes of x.
                            const int column = (half * 4 + k) * 16 + member * 4;
                            uint2 scale;
                            if (norm) {
                                scale = load_shared(stage + scale_offset + column * 2);
                            }
#pragma unroll
                            for (int j = 0; j < P::kRowTiles; ++j) {
                                unsigned(&x)[4] = input[k][j];
#pragma unroll
                                for (int upper = 0; upper < (kGroups == 1 ? 1 : 2); ++upper) {
                                    const int row = min(j * 16 + upper * 8 + group, rows - 1);
                                    const int line = (own_box * 2 + half) * rows + row;
                                    const int vector = (k * 2 + member / 2) ^ line % 8;
                                    uint2 pairs = load_shared(stage + P::kWeightBytes + line * kBoxBytes +
                                                              vector * kVector + member % 2 * 8);
                                    if (norm) {
                                        if (sums_squares) {
                                            unsigned both[4] = {pairs.x, pairs.x, pairs.y, pairs.y};
                                            multiply_tile(square[2 * j + upper], both, pairs.x, pairs.y);
                                        }
                                        pairs.x = multiply_pairs(pairs.x, scale.x);
                                        pairs.y = multiply_pairs(pairs.y, scale.y);
                                    }
                                    pairs.x = multiply_pairs(pairs.x, kInputFactor);
                                    pairs.y = multiply_pairs(pairs.y, kInputFactor);
                                    x[upper] = __byte_perm(pairs.x, pairs.y, 0x5410);
                                    x[2 + upper] = __byte_perm(pairs.x, pairs.y, 0x7632);
                                }
                                if constexpr (kGroups == 1) {
                                    x[1] = x[0];
                                    x[3] = x[2];
                                }
                            }
                        }
#pragma unroll
                        for (int part = 0; part < P::kParts; ++part) {
                            unsigned packed[4];
                            load_matrices(packed, weights_of(half, part));
#pragma unroll
                            for (int k = 0; k < 4; ++k) {
                                unsigned even;
                                unsigned odd;
                                expand_fp8(packed[k], even, odd);
#pragma unroll
                                for (int j = 0; j < P::kRowTiles; ++j) {
                                    multiply_tile(sum[0][j][part], input[k][j], even, odd);
                                }
                            }
                        }
                    }
                }
            }
            __syncwarp();
            if (lane == 0) {
                arrive(empty + slot * 8);
            }
            if (++slot == stages) {
                slot = 0;
                parity ^= 1;
            }
        }

        // The tile's end: put together what the warps have.
#pragma unroll
        for (int j = 0; j < P::kRowTiles; ++j) {
#pragma unroll
            for (int part = 0; part < P::kParts; ++part) {
                float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
                for (int chain = 0; chain < P::kChains; ++chain) {
                    const float *values = sum[chain][j][part];
                    total = add(total, make_float4(values[0], values[1], values[2], values[3]));
                }
                sums[warp * P::kVectors + (j * P::kParts + part) * kWarp + lane] = total;
            }
        }
        constexpr int kSquares = 8 * kGroups;
        // Of FP8 weights both halves of the rows are the same 8.
        const auto kSquareRow = [](int j) { return kWeight == WeightType::kBFloat16 ? j % 2 : 0; };
        if (sums_squares && member == group / 2) {
            // The diagonal: row and column are `group` where the column's lane is group / 2.
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const float lower = group % 2 == 1 ? square[j][1] : square[j][0];
                const float upper = group % 2 == 1 ? square[j][3] : square[j][2];
                squares[own_box * kSquares + j * 8 + group] = kSquareRow(j) == 0 ? lower : upper;
            }
        }
        together();

        // Vectors of sums are numbered [row tile][part of the tile][lane].
        constexpr int kTileVectors = P::kRowTiles * kTile * kWarp;
        constexpr int kPartial = kTileVectors * 4 + kSquares;  // floats of one split of a tile
        const auto block_total = [&](int vector) {
            const int in_warp = vector % kWarp;
            const int part = vector / kWarp % kTile;
            const int row_tile = vector / kWarp / kTile;
            const float4 *first = sums + part / P::kParts * P::kBoxes * P::kVectors +
                                  (row_tile * P::kParts + part % P::kParts) * kWarp + in_warp;
            float4 total = first[0];
#pragma unroll
            for (int k = 1; k < P::kBoxes; ++k) {
                total = add(total, first[k * P::kVectors]);
            }
            return total;
        };
        const auto block_square = [&](int row) {
            float total = 0;
#pragma unroll
            for (int k = 0; k < P::kBoxes; ++k) {
                total += squares[k * kSquares + row];
            }
            return total;
        };
        bool finish = true;
        if (task.splits > 1) {
            float *own = a.partials + static_cast<std::int64_t>(item) * kPartial;
            for (int i = threadIdx.x; i < kTileVectors; i += kThreads) {
                __stcg(reinterpret_cast<float4 *>(own) + i, block_total(i));
            }
            if (norm && threadIdx.x < kSquares) {
                __stcg(own + kTileVectors * 4 + threadIdx.x, block_square(threadIdx.x));
            }
            __threadfence();
            together();
            if (threadIdx.x == 0) {
                head.last = atomicAdd(a.tickets + tile, 1) == task.splits - 1;
                if (head.last) {
                    a.tickets[tile] = 0;  // for the next launch
                }
                __threadfence();
            }
            together();
            finish = head.last;
        }
        if (finish) {
            const float *partials = a.partials + static_cast<std::int64_t>(tile) * task.splits * kPartial;
            const auto total_of = [&](int vector) {
                if (task.splits == 1) {
                    return block_total(vector);
                }
                float4 total = make_float4(0, 0, 0, 0);
                for (int k = 0; k < task.splits; ++k) {
                    total = add(total, __ldcg(reinterpret_cast<const float4 *>(partials + k * kPartial) + vector));
                }
                return total;
            };
            const float weight_scale =
                kWeight == WeightType::kBFloat16 ? 1.0F : __ldg(a.scale) * kSumFactor;
            const auto factor_of = [&](int row) {
                if (!norm) {
                    return weight_scale;
                }
                float total = 0;
                if (task.splits == 1) {
                    total = block_square(row);
                } else {
                    for (int k = 0; k < task.splits; ++k) {
                        total += __ldcg(partials + k * kPartial + kTileVectors * 4 + row);
                    }
                }
                return weight_scale * rsqrtf(total / static_cast<float>(a.in_features) + a.epsilon);
            };
            const int parts = a.swiglu ? kTile / 2 : kTile;
            const int features = a.swiglu ? a.out_features / 2 : a.out_features;
            for (int i = threadIdx.x; i < P::kRowTiles * parts * kWarp; i += kThreads) {
                const int in_warp = i % kWarp;
                const int part = i / kWarp % parts;
                const int row_tile = i / kWarp / parts;
                const int feature = (tile * parts + part) * kTileRows + in_warp % 4 * 2;
                const int row = row_tile * 16 + in_warp / 4;
                if (feature >= features || row >= rows) {
                    continue;
                }
                const int vector = (row_tile * kTile + part) * kWarp + in_warp;
                if (a.residual != nullptr && i >= kThreads) {
                    load_residual(i);
                }
                const float4 value = total_of(vector);
                float4 other = make_float4(0, 0, 0, 0);
                if (a.swiglu) {
                    other = total_of(vector + parts * kWarp);
                }
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    const int row_of_pair = row + upper * 8;
                    if (row_of_pair >= rows) {
                        break;
                    }
                    const float factor = factor_of(row_of_pair);
                    // Each result is rounded where a layer of single operations would round it.
                    float x = round_bf16((upper ? value.z : value.x) * factor);
                    float y = round_bf16((upper ? value.w : value.y) * factor);
                    const std::int64_t at = (static_cast<std::int64_t>(row_of_pair) * features + feature) * 2;
                    if (a.swiglu) {
                        x = x / (1.0F + __expf(-x)) * round_bf16((upper ? other.z : other.x) * factor);
                        y = y / (1.0F + __expf(-y)) * round_bf16((upper ? other.w : other.y) * factor);
                    } else if (a.residual != nullptr) {
                        const float2 before = unpack(residual[upper]);
                        x += before.x;
                        y += before.y;
                    }
                    *reinterpret_cast<unsigned *>(a.output + at) = pack(x, y);
                }
            }
        }
        together();  // `sums` is to be written again
    }
}

int divide_up(std::int64_t dividend, std::int64_t divisor) {
    return static_cast<int>((dividend + divisor - 1) / divisor);
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
                   "cudaGetDriverEntryPointByVersion");
        if (result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        }
        return reinterpret_cast<EncodeTiled>(found);
    }();
    return function;
}

// A matrix [rows, columns] as the copy engine sees it: `boxes` at a time of 128 bytes of columns of `box_rows` rows.
CUtensorMap map_of(const char *data, int rows, int columns, bool wide, int box_rows, int boxes) {
    CUtensorMap map;
    const int box_columns = kBoxBytes / (wide ? 2 : 1);
    const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * (wide ? 2 : 1);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(box_columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(columns / box_columns)};
    const cuuint64_t strides[] = {row_bytes, kBoxBytes};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                              static_cast<cuuint32_t>(boxes)};
    const cuuint32_t steps[] = {1, 1, 1};
    const CUresult result = encode_tiled()(
        &map, wide ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<char *>(data),
        sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
    }
    return map;
}

template <WeightType kWeight, int kGroups, int kTile, int kSplit>
void launch(const LinearArguments &a, int splits, int device, cudaStream_t stream) {
    using P = Plan<kWeight, kGroups, kTile, kSplit>;
    const int tiles = divide_up(a.out_features, kTile * kTileRows);
    const int blocks = multiprocessors(device);
    const Task task = {map_of(a.weight, a.out_features, a.in_features, kWeight == WeightType::kBFloat16,
                              a.swiglu ? kTile / 2 * kTileRows : kTile * kTileRows, P::kBoxes),
                       map_of(a.input, a.rows, a.in_features, true, a.rows, P::kBoxes * P::kInputs), a, tiles, splits,
                       a.tickets + blocks};
    const auto kernel = linear_kernel<kWeight, kGroups, kTile, kSplit>;
    static std::atomic<bool> allowed[64];
    if (!allowed[device].load(std::memory_order_relaxed)) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kBudget),
                   "cudaFuncSetAttribute");
        // Else a multiprocessor may be set to room for one block only.
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        cudaSharedmemCarveoutMaxShared),
                   "cudaFuncSetAttribute");
        allowed[device].store(true, std::memory_order_relaxed);
    }
    const int items = tiles * splits;
    const int stages = P::stages(a.rows);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(items < blocks ? items : blocks);
    config.blockDim = dim3(kThreads + kWarp);
    config.dynamicSmemBytes = P::kHead + stages * P::stage_bytes(a.rows) + P::tail_bytes();
    config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, task, stages), "linear");
}

struct Choice {
    int tile;
    int splits;
};

// What a tile costs is what it reads (x is read from the second-level cache, and counts less) and a fixed part; blocks
// work on tiles in rounds. The numbers come from measurements on an H200.
Choice choose(const LinearArguments &a, int device, std::initializer_list<int> allowed) {
    const int blocks = multiprocessors(device);
    const double element = a.weight_type == WeightType::kBFloat16 ? 2 : 1;
    Choice best = {0, 1};
    double least = 0;
    for (const int tile : allowed) {
        if (a.swiglu && tile % 2 == 1) {
            continue;
        }
        const int tiles = divide_up(a.out_features, tile * kTileRows);
        for (int splits = 1; splits <= 8; splits *= 2) {
            if (splits > 1 && (tiles * splits > blocks || a.in_features / splits < 512)) {
                break;
            }
            const double rounds = divide_up(static_cast<std::int64_t>(tiles) * splits, blocks);
            const double read = (tile * kTileRows * element + 0.3 * a.rows * 2) * a.in_features / splits;
            const double cost = rounds * (read + 16e3) + (splits > 1 ? 150e3 + splits * a.rows * tile * 64.0 : 0);
            if (best.tile == 0 || cost < least) {
                best = {tile, splits};
                least = cost;
            }
        }
    }
    return best;
}

template <WeightType kWeight>
void choose_and_launch(const LinearArguments &a, int device, cudaStream_t stream) {
    if (a.rows <= 8) {
        const Choice choice = choose(a, device, {1, 2, 3, 4});
        switch (choice.tile) {
            case 1:
                return launch<kWeight, 1, 1, 1>(a, choice.splits, device, stream);
            case 2:
                return launch<kWeight, 1, 2, 1>(a, choice.splits, device, stream);
            case 3:
                return launch<kWeight, 1, 3, 1>(a, choice.splits, device, stream);
            default:
                return launch<kWeight, 1, 4, kWeight == WeightType::kBFloat16 ? 2 : 1>(a, choice.splits, device, stream);
        }
    }
    const Choice choice = choose(a, device, {2, 4, 6, 8, 12, 16});
    if (a.rows <= 16) {
        switch (choice.tile) {
            case 2:
                return launch<kWeight, 2, 2, 1>(a, choice.splits, device, stream);
            case 4:
                return launch<kWeight, 2, 4, 2>(a, choice.splits, device, stream);
            case 6:
                return launch<kWeight, 2, 6, 2>(a, choice.splits, device, stream);
            case 8:
                return launch<kWeight, 2, 8, 4>(a, choice.splits, device, stream);
            case 12:
                return launch<kWeight, 2, 12, 4>(a, choice.splits, device, stream);
            default:
                return launch<kWeight, 2, 16, 4>(a, choice.splits, device, stream);
        }
    }
    switch (choice.tile) {
        case 2:
            return launch<kWeight, 4, 2, 1>(a, choice.splits, device, stream);
        case 4:
            return launch<kWeight, 4, 4, 2>(a, choice.splits, device, stream);
        case 6:
            return launch<kWeight, 4, 6, 2>(a, choice.splits, device, stream);
        case 8:
            return launch<kWeight, 4, 8, 4>(a, choice.splits, device, stream);
        case 12:
            return launch<kWeight, 4, 12, 4>(a, choice.splits, device, stream);
        default:
            return launch<kWeight, 4, 16, 4>(a, choice.splits, device, stream);
    }
}

}  // namespace

std::int64_t linear_partials(int device) {
    // A split of a tile for each block, of the largest kind.
    return static_cast<std::int64_t>(multiprocessors(device)) * (kMaxLinearRows * 128 + kMaxLinearRows);
}

std::int64_t linear_tickets(int device) {
    return multiprocessors(device) + 1;
}

void linear_cuda(const LinearArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (arguments.weight_type == WeightType::kBFloat16) {
        choose_and_launch<WeightType::kBFloat16>(arguments, device, cuda_stream);
    } else {
        choose_and_launch<WeightType::kFloat8E4M3>(arguments, device, cuda_stream);
    }
}

}  // namespace llama_te
