// y = x W^T for a few rows x, which is bound by how fast W streams from memory, with what surrounds it in a layer fused:
// RMSNorm of x before it, SwiGLU or the residual's addition behind it. Products that follow each other are one launch.
//
// A block works on tiles, 16 to 128 rows of W. A thread keeps a ring of stages filled by the copy engine: a stage has 128
// bytes of columns of W for each of the warps that share them, and x for these, which another thread adds. W does not
// depend on what was computed before, so its thread goes on to the next tile, and to the next product, while earlier
// ones are still worked on, and begins before the kernel ahead has ended (programmatic dependent launch). So memory is
// busy where one product waits for the other: x is there once all tiles of the product before are counted as done.
//
// The other warps multiply: each has columns of its own, and the sums are added in a fixed order at the tile's end. Where
// a tile's columns are split over blocks, the block that comes last adds up.
//
// Tensor cores multiply x (16 rows, m) with 8 rows of W (n) over 16 columns (k). Which columns these are does not matter
// as long as both agree, so a lane takes what lies in one vector of 16 bytes.
//
// RMSNorm is x * r * w with r, a number for each row, known only when the row has been seen: the product is taken of
// x * w, and multiplied by r. The sum of squares comes from the tensor cores too, as the diagonal of x x^T.

#include <cuda_bf16.h>

#include <algorithm>

#include "copy_engine.cuh"
#include "linear.h"
#include "warp.cuh"

namespace llama_te {

namespace {

constexpr int kVector = 16;   // bytes
constexpr int kBoxBytes = 128;   // of one row of W: what the copy engine swizzles
constexpr int kBoxVectors = kBoxBytes / kVector;
constexpr int kTileRows = 8;  // rows of W of one tensor core product

struct Product {
    CUtensorMap weight;
    CUtensorMap input;
    LinearArguments a;
    int tile;  // times 8 rows of W
    int tiles;
    int splits;
    std::int32_t *taken;  // how many items were drawn, see below
    std::int32_t *done;   // how many tiles are finished, counted by each warp that does that

    __device__ int items() const {
        return tiles * splits;
    }
};

struct Task {
    Product products[kMaxProducts];
    int count;
    std::int32_t *exits;  // how many blocks have seen all products done that they wait for
};

// A box of [columns of a box, rows, boxes], which lie one behind the other in shared memory.
__device__ void copy_boxes(unsigned to, const CUtensorMap &map, int row, int box, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(&map), "r"(0), "r"(row), "r"(box), "r"(barrier)
        : "memory");
}

// Until so many blocks have counted, or tiles were counted, on the whole GPU. What was written before can be read then,
// by the copy engine too.
__device__ void wait_for_count(const std::int32_t *counter, int count) {
    int counted;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(counted) : "l"(counter) : "memory");
    } while (counted < count);
    asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ void count(std::int32_t *counter) {
    asm volatile("fence.proxy.async;" ::: "memory");
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ void copy_bulk(unsigned to, const char *from, int bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// --- arithmetic

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

// How the warps of a block share the work. kGroups: of 8 rows of x.
template <WeightType kWeight, int kGroups>
struct Shape {
    static constexpr bool kWide = kWeight == WeightType::kBFloat16;
    static constexpr int kWarps = 8;  // that multiply
    static constexpr int kWeightsWarp = kWarps;
    static constexpr int kInputsWarp = kWarps + 1;
    // Warps that put sums together: with few rows some of their own, so that the others go on meanwhile; with many rows
    // all that multiply, since it is too much for a few.
    static constexpr bool kOwnFinishers = kGroups == 1;
    static constexpr int kFinishers = kOwnFinishers ? 2 : kWarps;
    static constexpr int kFirstFinisher = kOwnFinishers ? kWarps + 2 : 0;
    static constexpr int kAllThreads = (kWarps + 2 + (kOwnFinishers ? kFinishers : 0)) * kWarp;
    static constexpr int kElements = kWide ? 8 : 16;  // of a vector of W
    static constexpr int kBoxColumns = kElements * kBoxVectors;
    static constexpr int kInputs = kElements / 8;                     // boxes of x to one of W
    static constexpr int kRowTiles = kGroups == 1 ? 1 : kGroups / 2;  // of 16 rows of x
    static constexpr int kSquares = 8 * kGroups;                      // a number for each row of x
    // Sets of sums that take turns, where multiplications would wait for each other.
    static constexpr int kChains = kGroups == 1 ? 2 : 1;
    static constexpr int kWeightBytes = 32 * 1024;  // of W in a stage
    static constexpr int kMaxStages = 8;
    static constexpr int kHead = 1024;  // see Head; boxes begin at multiples of 1024 bytes
    // All that a block can have, but for a few rows with FP8 weights, which a shorter ring suits better.
    static constexpr int kBudget = (kGroups == 1 && !kWide ? 150 : 226) * 1024;
    static constexpr int kSumBytes = kWarps * kRowTiles * (32 / kWarps) * kWarp * 16;
    static constexpr int kTailBytes = kSumBytes + 16 * kSquares * 4;
    // Rows of W of a tile, times 8. Few kinds, since code that is seldom used has to be fetched first.
    static constexpr int kSmallTile = kGroups == 1 ? 2 : 8;
    static constexpr int kLargeTile = kGroups == 1 ? 4 : 16;

    // Boxes of a stage.
    __host__ __device__ static constexpr int boxes_of(int tile) {
        return kWeightBytes / (tile * kTileRows * kBoxBytes);
    }
};

// A tile of kTile times 8 rows of W. A stage has as many columns as make its bytes.
template <typename S, int kTile_>
struct Plan : S {
    static constexpr int kTile = kTile_;
    static constexpr int kRows = kTile * kTileRows;
    static constexpr int kBoxes = S::boxes_of(kTile);                                    // of a stage
    static constexpr int kOwnBoxes = kBoxes > S::kWarps ? kBoxes / S::kWarps : 1;        // of a warp
    static constexpr int kSplit = S::kWarps > kBoxes ? S::kWarps / kBoxes : 1;           // warps that share a box
    static constexpr int kParts = kTile / kSplit;                                        // of 8 rows, of a warp
    static constexpr int kColumnWarps = S::kWarps / kSplit;                              // that share a tile's columns
    static constexpr int kInputBytes = kBoxes * S::kBoxColumns * 2;                      // of a row of x in a stage
    static constexpr int kVectors = S::kRowTiles * kParts * kWarp;                       // of 4 sums, of a warp
    static_assert(S::kWarps * kVectors * 16 <= S::kSumBytes && kParts >= 2);
};

template <typename S, typename Function>
__device__ void with_plan(int tile, const Function &function) {
    if (tile == S::kSmallTile) {
        function(Plan<S, S::kSmallTile>{});
    } else {
        function(Plan<S, S::kLargeTile>{});
    }
}

struct Head {
    // Barriers of the ring's stages: W is on its way, W and x are there, both were read.
    std::uint64_t begun[8];
    std::uint64_t full[8];
    std::uint64_t empty[8];
    // Of a stage:
    int product[8];  // kNone: there are no more
    int item[8];     // a split of a tile
    int box[8];      // its first
    // Barriers of the sums: they are there, they were read.
    std::uint64_t sums_full;
    std::uint64_t sums_empty;
    // Of items, by turns: when one is begun, the one before may not be finished yet.
    std::uint64_t item_begun[2];
    int finish_product[2];
    int finish_item[2];
    bool new_squares[2];
    bool last;
    float factor[kMaxLinearRows];  // of the norm, for the product that is being finished
};

constexpr int kNone = -1;

// A stage of the ring and how often it was used: barriers have completed as many phases.
struct Turn {
    int slot = 0;
    unsigned parity = 0;

    __device__ void next(int stages) {
        if (++slot == stages) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// What the threads of a block share.
struct Block {
    const Task &task;
    Head &head;
    unsigned ring;
    float4 *sums;    // [warps, vectors of a warp]
    float *squares;  // [warps that share columns, rows of x]
    int stages;
    int slot_bytes;
    int rows;

    __device__ unsigned begun(const Turn &turn) const {
        return address_of(head.begun + turn.slot);
    }
    __device__ unsigned full(const Turn &turn) const {
        return address_of(head.full + turn.slot);
    }
    __device__ unsigned empty(const Turn &turn) const {
        return address_of(head.empty + turn.slot);
    }
    __device__ unsigned stage(const Turn &turn) const {
        return ring + turn.slot * slot_bytes;
    }
};

// Fills the ring with W, stage by stage. One thread of each block.
//
// A block's first two items of a product are given. Multiprocessors are not equally near to the memory, so whoever is
// done then draws the next one: its number is asked for when an item begins, and looked at when that ends. Launches that
// overlap share the counters, so nobody asks before the kernel ahead has ended.
template <typename S>
__device__ void stream_weights(const Block &block) {
    const Task &task = block.task;
    Head &head = block.head;
    const int blocks = gridDim.x;
    bool waited = false;
    Turn turn;
    for (int number = 0; number < task.count; ++number) {
        const Product &product = task.products[number];
        const LinearArguments &a = product.a;
        const int items = product.items();
        const int boxes = a.in_features / S::kBoxColumns;
        const int tile_rows = product.tile * kTileRows;
        const int stage_boxes = S::boxes_of(product.tile);
        const int drawn_items = max(items - 2 * blocks, 0);
        int drawn = 0;
        int item = blockIdx.x;
        for (int turns = 0;; ++turns) {
            if (turns == 1) {
                item = blockIdx.x + blocks;
            } else if (turns > 1) {
                if (drawn == drawn_items + blocks - 1) {
                    *product.taken = 0;  // every block has asked in vain: for a later launch
                }
                item = drawn_items > 0 ? 2 * blocks + drawn : items;
            }
            if (item >= items) {
                break;
            }
            if (turns > 0 && drawn_items > 0) {
                if (!waited) {
                    asm volatile("griddepcontrol.wait;" ::: "memory");
                    waited = true;
                }
                drawn = atomicAdd(product.taken, 1);
            }
            const int tile = item / product.splits;
            const int split = item - tile * product.splits;
            const int end = boxes * (split + 1) / product.splits;
            for (int box = boxes * split / product.splits; box < end; box += stage_boxes) {
                const unsigned to = block.stage(turn);
                wait(block.empty(turn), turn.parity ^ 1);
                head.product[turn.slot] = number;
                head.item[turn.slot] = item;
                head.box[turn.slot] = box;
                arrive(block.begun(turn));
                // Boxes behind the last column count too: they are filled with zeros.
                arrive_and_expect(block.full(turn), S::kWeightBytes);
                if (a.swiglu) {
                    // The gate's rows, then those of the up projection for the same features.
                    copy_boxes(to, product.weight, tile * tile_rows / 2, box, block.full(turn));
                    copy_boxes(to + S::kWeightBytes / 2, product.weight, a.out_features / 2 + tile * tile_rows / 2,
                               box, block.full(turn));
                } else {
                    copy_boxes(to, product.weight, tile * tile_rows, box, block.full(turn));
                }
                turn.next(block.stages);
            }
        }
    }
    wait(block.empty(turn), turn.parity ^ 1);
    head.product[turn.slot] = kNone;
    arrive(block.begun(turn));
    arrive(block.full(turn));
}

// Adds x, and the norm's weight, once they may be read. Another thread of each block.
template <typename S>
__device__ void stream_inputs(const Block &block) {
    const Task &task = block.task;
    // What the kernel ahead wrote may be read from here on, and anything be written. The next kernel may begin only then,
    // so that it finds all that came before this one in memory.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
    int readable = 0;  // product whose x is there
    for (Turn turn;; turn.next(block.stages)) {
        wait(block.begun(turn), turn.parity);
        const int number = block.head.product[turn.slot];
        if (number == kNone) {
            arrive(block.full(turn));
            break;
        }
        const Product &product = task.products[number];
        const LinearArguments &a = product.a;
        if (readable < number) {
            wait_for_count(task.products[number - 1].done, task.products[number - 1].tiles * S::kFinishers);
            readable = number;
        }
        const int stage_boxes = S::boxes_of(product.tile);
        const int box = block.head.box[turn.slot];
        const int boxes = a.in_features / S::kBoxColumns;
        const unsigned to = block.stage(turn) + S::kWeightBytes;
        const int input_bytes = a.rows * stage_boxes * S::kBoxColumns * 2;
        const int scale_bytes = a.norm_weight == nullptr ? 0 : min(stage_boxes, boxes - box) * S::kBoxColumns * 2;
        arrive_and_expect(block.full(turn), input_bytes + scale_bytes);
        copy_boxes(to, product.input, 0, box * S::kInputs, block.full(turn));
        if (scale_bytes > 0) {
            copy_bulk(to + input_bytes, a.norm_weight + box * S::kBoxColumns * 2, scale_bytes, block.full(turn));
        }
    }
    // A block that is here has seen all but the last product done. When all are here, nobody looks at the counters.
    if (task.count > 1 && atomicAdd(task.exits, 1) == static_cast<int>(gridDim.x) - 1) {
        for (int number = 0; number < task.count - 1; ++number) {
            *task.products[number].done = 0;  // for a later launch
        }
        *task.exits = 0;
    }
}

// Multiplies an item's columns, those of this warp, and hands the sums over.
template <typename P>
__device__ void multiply(const Block &block, const Product &product, bool new_squares, unsigned sums_parity,
                         Turn &turn) {
    constexpr int kGroups = P::kSquares / 8;
    const LinearArguments &a = product.a;
    const Head &head = block.head;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int rows = block.rows;
    const int group = lane / 4;
    const int member = lane % 4;
    const int first_box = warp % P::kColumnWarps * P::kOwnBoxes;
    const int first_part = warp / P::kColumnWarps * P::kParts;
    const bool norm = a.norm_weight != nullptr;
    const bool sums_squares = new_squares && first_part == 0;
    // Where this lane's rows of matrices begin in a stage. The copy engine has exchanged vectors: in line l of its boxes
    // vector v is at v xor l % 8, so that what the 8 rows of a matrix hold is in different banks.
    const int in_matrix = lane % 8;
    const int matrix = lane / 8;
    const auto part_offset = [&](int part) {
        constexpr int kHalf = P::kTile / 2;
        const int place = !a.swiglu       ? first_box * P::kTile + part
                          : part < kHalf ? first_box * kHalf + part
                                         : (P::kBoxes + first_box - 1) * kHalf + part;
        return (place * kTileRows + in_matrix) * kBoxBytes + (matrix ^ in_matrix) * kVector;
    };
    constexpr int kLow = P::kParts / 2;  // with SwiGLU a warp may have parts of the gate, and as many of the other
    const int low_offset = part_offset(first_part);
    const int high_offset = part_offset(first_part + kLow) - kLow * kTileRows * kBoxBytes;
    const int box_bytes = (a.swiglu ? P::kRows / 2 : P::kRows) * kBoxBytes;
    // Of the rows of x that are not there, others are taken: what comes of them is not looked at.
    const auto input_offset = [&](int box, int row, int vector) {
        const int line = box * rows + min(row, rows - 1);
        return P::kWeightBytes + line * kBoxBytes + (vector ^ line % 8) * kVector;
    };

    const int item = head.item[turn.slot];
    const int end = a.in_features / P::kBoxColumns * (item % product.splits + 1) / product.splits;
    float sum[P::kChains][P::kRowTiles][P::kParts][4] = {};
    float square[kGroups][4] = {};
#pragma unroll 1
    for (int box = head.box[turn.slot]; box < end; box += P::kBoxes) {
        wait(block.full(turn), turn.parity);
        const unsigned stage = block.stage(turn);
        const int scale_offset = P::kWeightBytes + rows * P::kInputBytes;
#pragma unroll
        for (int own = 0; own < P::kOwnBoxes; ++own) {
            const int box_of_stage = first_box + own;
            if (box + box_of_stage >= end) {
                break;
            }
            const auto weights_of = [&](int half, int part) {
                return stage + ((part < kLow ? low_offset : high_offset) ^ half * 4 * kVector) +
                       part * kTileRows * kBoxBytes + own * box_bytes;
            };
            const unsigned scales = stage + scale_offset + box_of_stage * P::kBoxColumns * 2;
            if constexpr (P::kWide) {
                // All that is needed is on its way before the first is used.
                unsigned input[4][P::kRowTiles][4];
                unsigned scale[2][4];
                unsigned weight[2][P::kParts][4];
                if constexpr (kGroups == 1) {
                    // Four vectors of 8 rows, of two steps. The other 8 rows of a tensor core product count nowhere.
                    const int offset = input_offset(box_of_stage, in_matrix, matrix);
#pragma unroll
                    for (int k = 0; k < 4; k += 2) {
                        unsigned vectors[4];
                        load_matrices(vectors, stage + (offset ^ k * 2 * kVector));
                        input[k][0][0] = vectors[0];
                        input[k][0][2] = vectors[1];
                        input[k + 1][0][0] = vectors[2];
                        input[k + 1][0][2] = vectors[3];
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < P::kRowTiles; ++j) {
                        const int offset =
                            input_offset(box_of_stage, j * 16 + matrix % 2 * 8 + in_matrix, matrix / 2);
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            load_matrices(input[k][j], stage + (offset ^ k * 2 * kVector));
                        }
                    }
                }
                if (norm) {
                    load_matrices(scale[0], scales + matrix * kVector);
                    load_matrices(scale[1], scales + (4 + matrix) * kVector);
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
                                    x[1] = x[0];
                                    x[3] = x[2];
                                    multiply_tile(square[0], x, x[0], x[2]);
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
                    if constexpr (kGroups == 1) {
                        input[k][0][1] = input[k][0][0];
                        input[k][0][3] = input[k][0][2];
                    }
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
                    uint2 scale[4];
                    uint2 pairs[4][kGroups];
                    unsigned weight[P::kParts][4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        // A lane's 4 columns in a matrix of W, which are 8 bytes of x.
                        if (norm) {
                            scale[k] = load_shared(scales + ((half * 4 + k) * 16 + member * 4) * 2);
                        }
#pragma unroll
                        for (int g = 0; g < kGroups; ++g) {
                            pairs[k][g] = load_shared(
                                stage + member % 2 * 8 +
                                input_offset(box_of_stage * 2 + half, g * 8 + group, k * 2 + member / 2));
                        }
                    }
#pragma unroll
                    for (int part = 0; part < P::kParts; ++part) {
                        load_matrices(weight[part], weights_of(half, part));
                    }
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        uint2 factor = make_uint2(kInputFactor, kInputFactor);
                        if (norm) {
                            factor.x = multiply_pairs(scale[k].x, kInputFactor);
                            factor.y = multiply_pairs(scale[k].y, kInputFactor);
                        }
                        unsigned input[P::kRowTiles][4];
#pragma unroll
                        for (int g = 0; g < kGroups; ++g) {
                            const uint2 pair = pairs[k][g];
                            if (sums_squares) {
                                unsigned both[4] = {pair.x, pair.x, pair.y, pair.y};
                                multiply_tile(square[g], both, pair.x, pair.y);
                            }
                            const unsigned first = multiply_pairs(pair.x, factor.x);
                            const unsigned second = multiply_pairs(pair.y, factor.y);
                            input[g / 2][g % 2] = __byte_perm(first, second, 0x5410);
                            input[g / 2][2 + g % 2] = __byte_perm(first, second, 0x7632);
                        }
                        if constexpr (kGroups == 1) {
                            input[0][1] = input[0][0];
                            input[0][3] = input[0][2];
                        }
#pragma unroll
                        for (int part = 0; part < P::kParts; ++part) {
                            unsigned even;
                            unsigned odd;
                            expand_fp8(weight[part][k], even, odd);
#pragma unroll
                            for (int j = 0; j < P::kRowTiles; ++j) {
                                multiply_tile(sum[k % P::kChains][j][part], input[j], even, odd);
                            }
                        }
                    }
                }
            }
        }
        __syncwarp();
        if (lane == 0) {
            arrive(block.empty(turn));
        }
        turn.next(block.stages);
    }

    wait(address_of(&head.sums_empty), sums_parity ^ 1);
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
            block.sums[warp * P::kVectors + (j * P::kParts + part) * kWarp + lane] = total;
        }
    }
    // Of FP8 weights both halves of the rows are the same 8.
    if (sums_squares && member == group / 2) {
        // The diagonal: row and column are `group` where the column's lane is group / 2.
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const float lower = group % 2 == 1 ? square[g][1] : square[g][0];
            const float upper = group % 2 == 1 ? square[g][3] : square[g][2];
            block.squares[warp % P::kColumnWarps * P::kSquares + g * 8 + group] =
                P::kWide && g % 2 == 1 ? upper : lower;
        }
    }
    __syncwarp();
    if (lane == 0) {
        arrive(address_of(&head.sums_full));
    }
}

// Puts an item's sums together, in a fixed order, and makes of them what the product's result is. Its own warps do that,
// so that the others go on meanwhile. Each takes 8 rows of W and 16 of x at a time.
template <typename S>
__device__ void finish(const Block &block, const Product &product, int item, bool counts, unsigned parity) {
    const LinearArguments &a = product.a;
    Head &head = block.head;
    const int thread = threadIdx.x - S::kFirstFinisher * kWarp;
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    const int rows = block.rows;
    const int splits = product.splits;
    const int tile = item / splits;
    const bool norm = a.norm_weight != nullptr;
    const bool small = product.tile == S::kSmallTile;
    const auto together = [] { asm volatile("bar.sync 1, %0;" ::"n"(S::kFinishers * kWarp) : "memory"); };
    const auto sums_were_read = [&] {
        __syncwarp();
        if (lane == 0) {
            arrive(address_of(&head.sums_empty));
        }
    };

    // The part of the tile and the 16 rows of x that this warp has next, for which a lane has 2 features of 2 rows.
    const int parts = a.swiglu ? product.tile / 2 : product.tile;
    const int features = a.swiglu ? a.out_features / 2 : a.out_features;
    struct Place {
        int part;
        int row_tile;
        int row;
        int feature;
    };
    const auto place_of = [&](int i) {
        const int row_tile = S::kRowTiles > 1 && i >= parts ? 1 : 0;
        const int part = i - row_tile * parts;
        return Place{part, row_tile, row_tile * 16 + lane / 4, (tile * parts + part) * kTileRows + lane % 4 * 2};
    };
    // What will be added is on its way meanwhile, as far as it is the first.
    unsigned residual[2] = {};
    const auto load_residual = [&](const Place &place) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            const int row = place.row + upper * 8;
            if (a.residual != nullptr && row < rows && place.feature < a.out_features) {
                residual[upper] = __ldcg(reinterpret_cast<const unsigned *>(
                    a.residual + (static_cast<std::int64_t>(row) * a.out_features + place.feature) * 2));
            }
        }
    };
    if (warp < S::kRowTiles * parts) {
        load_residual(place_of(warp));
    }

    wait(address_of(&head.sums_full), parity);
    const auto sum_of = [&](auto plan, int part, int row_tile) {
        using P = decltype(plan);
        const float4 *first = block.sums + part / P::kParts * P::kColumnWarps * P::kVectors +
                              (row_tile * P::kParts + part % P::kParts) * kWarp + lane;
        float4 total = first[0];
#pragma unroll
        for (int k = 1; k < P::kColumnWarps; ++k) {
            total = add(total, first[k * P::kVectors]);
        }
        return total;
    };
    const auto block_total = [&](int part, int row_tile) {
        return small ? sum_of(Plan<S, S::kSmallTile>{}, part, row_tile)
                     : sum_of(Plan<S, S::kLargeTile>{}, part, row_tile);
    };
    const auto block_square = [&](int row) {
        const int warps = small ? Plan<S, S::kSmallTile>::kColumnWarps : Plan<S, S::kLargeTile>::kColumnWarps;
        float total = 0;
#pragma unroll 4
        for (int k = 0; k < warps; ++k) {
            total += block.squares[k * S::kSquares + row];
        }
        return total;
    };
    const int tile_vectors = S::kRowTiles * product.tile * kWarp;
    const int partial_floats = tile_vectors * 4 + S::kSquares;  // of one split of a tile
    const float *const partials = a.partials + static_cast<std::int64_t>(tile) * splits * partial_floats;
    const auto vector_of = [&](int part, int row_tile) { return (row_tile * product.tile + part) * kWarp + lane; };
    const bool new_squares = head.new_squares[parity];
    if (splits > 1) {
        float *const own = a.partials + static_cast<std::int64_t>(item) * partial_floats;
#pragma unroll 2
        for (int part = warp; part < product.tile; part += S::kFinishers) {
#pragma unroll
            for (int row_tile = 0; row_tile < S::kRowTiles; ++row_tile) {
                if (row_tile * 16 + lane / 4 < rows) {
                    __stcg(reinterpret_cast<float4 *>(own) + vector_of(part, row_tile), block_total(part, row_tile));
                }
            }
        }
        if (norm && thread < rows) {
            __stcg(own + tile_vectors * 4 + thread, block_square(thread));
        }
        sums_were_read();
        __threadfence();
        together();
        if (thread == 0) {
            head.last = atomicAdd(a.tickets + tile, 1) == splits - 1;
            if (head.last) {
                a.tickets[tile] = 0;  // for the next launch
            }
            __threadfence();
        }
        together();
        if (!head.last) {
            return;
        }
    }
    if (new_squares) {
        together();  // nobody needs the factors before these any more
        if (thread < rows) {
            float total = 0;
            if (splits == 1) {
                total = block_square(thread);
            } else {
#pragma unroll 1
                for (int k = 0; k < splits; ++k) {
                    total += __ldcg(partials + k * partial_floats + tile_vectors * 4 + thread);
                }
            }
            head.factor[thread] = rsqrtf(total / static_cast<float>(a.in_features) + a.epsilon);
        }
        together();
    }
    const auto total_of = [&](int part, int row_tile) {
        if (splits == 1) {
            return block_total(part, row_tile);
        }
        float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int k = 0; k < splits; ++k) {
            total = add(total, __ldcg(reinterpret_cast<const float4 *>(partials + k * partial_floats) +
                                      vector_of(part, row_tile)));
        }
        return total;
    };
    const float weight_scale = S::kWide ? 1.0F : __ldg(a.scale) * kSumFactor;
#pragma unroll 1
    for (int i = warp; i < S::kRowTiles * parts; i += S::kFinishers) {
        const Place place = place_of(i);
        if (i != warp) {
            load_residual(place);
        }
        if (place.feature >= features || place.row >= rows) {
            continue;
        }
        const float4 value = total_of(place.part, place.row_tile);
        float4 other = make_float4(0, 0, 0, 0);
        if (a.swiglu) {
            other = total_of(place.part + parts, place.row_tile);
        }
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
            const int row = place.row + upper * 8;
            if (row >= rows) {
                break;
            }
            const float factor = norm ? weight_scale * head.factor[row] : weight_scale;
            // Each result is rounded where a layer of single operations would round it.
            float x = round_bf16((upper ? value.z : value.x) * factor);
            float y = round_bf16((upper ? value.w : value.y) * factor);
            if (a.swiglu) {
                x = __fdividef(x, 1.0F + __expf(-x)) * round_bf16((upper ? other.z : other.x) * factor);
                y = __fdividef(y, 1.0F + __expf(-y)) * round_bf16((upper ? other.w : other.y) * factor);
            } else if (a.residual != nullptr) {
                const float2 before = unpack(residual[upper]);
                x += before.x;
                y += before.y;
            }
            *reinterpret_cast<unsigned *>(a.output + (static_cast<std::int64_t>(row) * features + place.feature) * 2) =
                pack(x, y);
        }
    }
    if (splits == 1) {
        sums_were_read();
    }
    __syncwarp();
    if (counts && lane == 0) {
        count(product.done);
    }
}

template <WeightType kWeight, int kGroups>
__global__ void __launch_bounds__(Shape<kWeight, kGroups>::kAllThreads, 1)
    linear_kernel(const __grid_constant__ Task task, const int stages, const int slot_bytes) {
    using S = Shape<kWeight, kGroups>;
    static_assert(sizeof(Head) <= S::kHead);
    extern __shared__ __align__(1024) char shared[];
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    Head &head = *reinterpret_cast<Head *>(shared);
    char *const tail = shared + S::kHead + stages * slot_bytes;
    const Block block = {task,
                         head,
                         address_of(shared) + S::kHead,
                         reinterpret_cast<float4 *>(tail),
                         reinterpret_cast<float *>(tail + S::kSumBytes),
                         stages,
                         slot_bytes,
                         task.products[0].a.rows};

    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; ++i) {
            initialize(address_of(head.begun + i), 1);
            initialize(address_of(head.full + i), 2);
            initialize(address_of(head.empty + i), S::kWarps);
        }
        initialize(address_of(head.item_begun), 1);
        initialize(address_of(head.item_begun + 1), 1);
        initialize(address_of(&head.sums_full), S::kWarps);
        initialize(address_of(&head.sums_empty), S::kFinishers);
        publish_barriers();
    }
    __syncthreads();

    if (warp == S::kWeightsWarp) {
        if (lane == 0) {
            stream_weights<S>(block);
        }
    } else if (warp == S::kInputsWarp) {
        if (lane == 0) {
            stream_inputs<S>(block);
        }
    } else if (warp < S::kWarps) {
        if constexpr (!S::kOwnFinishers) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
        }
        Turn turn;
        int squares_of = kNone;  // the product for which the norm's factors are known
        for (unsigned parity = 0;; parity ^= 1) {
            wait(block.full(turn), turn.parity);
            const int number = head.product[turn.slot];
            const bool new_squares = number != kNone && task.products[number].a.norm_weight != nullptr &&
                                     (task.products[number].splits > 1 || squares_of != number);
            if (threadIdx.x == 0) {
                head.finish_product[parity] = number;
                head.finish_item[parity] = head.item[turn.slot];
                head.new_squares[parity] = new_squares;
                arrive(address_of(head.item_begun + parity));
            }
            if (number == kNone) {
                break;
            }
            squares_of = new_squares ? number : squares_of;
            const Product &product = task.products[number];
            const int item = head.item[turn.slot];
            with_plan<S>(product.tile, [&](auto plan) {
                multiply<decltype(plan)>(block, product, new_squares, parity, turn);
            });
            if constexpr (!S::kOwnFinishers) {
                finish<S>(block, product, item, number < task.count - 1, parity);
            }
        }
    } else {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        for (unsigned items = 0;; ++items) {
            const unsigned parity = items % 2;
            wait(address_of(head.item_begun + parity), items / 2 % 2);
            const int number = head.finish_product[parity];
            if (number == kNone) {
                break;
            }
            const Product &product = task.products[number];
            finish<S>(block, product, head.finish_item[parity], number < task.count - 1, parity);
        }
    }
}

int divide_up(std::int64_t dividend, std::int64_t divisor) {
    return static_cast<int>((dividend + divisor - 1) / divisor);
}

// A matrix [rows, columns] as the copy engine sees it: `boxes` at a time of 128 bytes of columns of `box_rows` rows.
CUtensorMap map_of(const char *data, int rows, int columns, bool wide, int box_rows, int boxes) {
    const int box_columns = kBoxBytes / (wide ? 2 : 1);
    const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * (wide ? 2 : 1);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(box_columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(columns / box_columns)};
    const cuuint64_t strides[] = {row_bytes, kBoxBytes};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                              static_cast<cuuint32_t>(boxes)};
    return encode_map(wide ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, data, sizes, strides,
                      box, CU_TENSOR_MAP_SWIZZLE_128B);
}

struct Choice {
    int tile;
    int splits;
};

// What a tile costs is what it reads (x is read from the second-level cache, and counts less) and a fixed part; blocks
// work on tiles in rounds. The numbers come from measurements on an H200.
template <typename S>
Choice choose(const LinearArguments &a, int device) {
    const int blocks = multiprocessors(device);
    const double element = a.weight_type == WeightType::kBFloat16 ? 2 : 1;
    Choice best = {0, 1};
    double least = 0;
    for (const int tile : {S::kSmallTile, S::kLargeTile}) {
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

template <WeightType kWeight, int kGroups>
void launch(const std::vector<LinearArguments> &products, int device, cudaStream_t stream) {
    using S = Shape<kWeight, kGroups>;
    const int blocks = multiprocessors(device);
    Task task = {};
    task.count = static_cast<int>(products.size());
    std::int32_t *const counters = products[0].tickets + blocks;
    task.exits = counters + 2 * kMaxProducts;
    int most_items = 0;
    int slot_bytes = 0;
    for (int i = 0; i < task.count; ++i) {
        const LinearArguments &a = products[i];
        const auto [tile, splits] = choose<S>(a, device);
        const int tile_rows = tile * kTileRows;
        const int boxes = S::boxes_of(tile);
        const int tiles = divide_up(a.out_features, tile_rows);
        task.products[i] = {map_of(a.weight, a.out_features, a.in_features, S::kWide,
                                   a.swiglu ? tile_rows / 2 : tile_rows, boxes),
                            map_of(a.input, a.rows, a.in_features, true, a.rows, boxes * S::kInputs),
                            a,
                            tile,
                            tiles,
                            splits,
                            counters + i,
                            counters + kMaxProducts + i};
        most_items = std::max(most_items, tiles * splits);
        slot_bytes = std::max(slot_bytes, S::kWeightBytes + (a.rows + 1) * boxes * S::kBoxColumns * 2);
    }
    slot_bytes = divide_up(slot_bytes, 1024) * 1024;
    const int stages = std::min((S::kBudget - S::kHead - S::kTailBytes) / slot_bytes, S::kMaxStages);

    const auto kernel = linear_kernel<kWeight, kGroups>;
    static std::atomic<bool> allowed[64];
    if (!allowed[device].load(std::memory_order_relaxed)) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBudget),
                   "cudaFuncSetAttribute");
        allowed[device].store(true, std::memory_order_relaxed);
    }
    const int shared_bytes = S::kHead + stages * slot_bytes + S::kTailBytes;
    // Not a cooperative launch, although blocks of several products wait for each other: that could not begin before the
    // kernel ahead has ended. There are no more of them than multiprocessors, and what else may run ends by itself, but
    // for another such launch on another stream, against which the caller has to see.
    launch_overlapping(kernel, {dim3(std::min(most_items, blocks)), dim3(S::kAllThreads), shared_bytes}, stream,
                       "linear", task, stages, slot_bytes);
}

template <WeightType kWeight>
void choose_groups(const std::vector<LinearArguments> &products, int device, cudaStream_t stream) {
    const int rows = products[0].rows;
    if (rows <= 8) {
        return launch<kWeight, 1>(products, device, stream);
    }
    if (rows <= 16) {
        return launch<kWeight, 2>(products, device, stream);
    }
    return launch<kWeight, 4>(products, device, stream);
}

}  // namespace

std::int64_t linear_partials(int device) {
    // A split of a tile for each block, of the largest kind.
    return static_cast<std::int64_t>(multiprocessors(device)) * (kMaxLinearRows * 128 + kMaxLinearRows);
}

std::int64_t linear_tickets(int device) {
    return multiprocessors(device) + 2 * kMaxProducts + 1;
}

void linear_cuda(const std::vector<LinearArguments> &products, int device, std::uintptr_t stream) {
    if (products.empty() || products.size() > kMaxProducts) {
        throw std::invalid_argument("linear takes 1 to " + std::to_string(kMaxProducts) + " products, not " +
                                    std::to_string(products.size()));
    }
    for (const LinearArguments &product : products) {
        if (product.rows != products[0].rows || product.weight_type != products[0].weight_type) {
            throw std::invalid_argument("products of one launch must have as many rows and weights of one type");
        }
    }
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (products[0].weight_type == WeightType::kBFloat16) {
        choose_groups<WeightType::kBFloat16>(products, device, cuda_stream);
    } else {
        choose_groups<WeightType::kFloat8E4M3>(products, device, cuda_stream);
    }
}

}  // namespace llama_te
