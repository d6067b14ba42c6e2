// The mainloop: a math warp multiplies its columns of a work item and hands its sums over to the epilogue.
//
// Tensor cores multiply x (16 rows, m) with 8 rows of W (n) over 16 columns (k). The order of the columns does not matter
// as long as x and W agree, so a lane takes the columns that lie in one vector of 16 bytes.
//
// RMSNorm is x * r * w with a factor r for each row, which is known only once the whole row has been read: the product
// is computed of x * w, and the epilogue multiplies it by r. Tensor cores also compute the sum of squares, as the
// diagonal of x x^T.

#pragma once

#include "config.cuh"
#include "include/e4m3.cuh"
#include "include/mma.cuh"

namespace llama_te::gemv {

__device__ inline uint2 load_shared(unsigned from) {
    uint2 vector;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(vector.x), "=r"(vector.y) : "r"(from) : "memory");
    return vector;
}

__device__ inline void multiply_add_bf16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply_add<ElementType::kBFloat16>(sum, a, b0, b1);
}

__device__ inline float4 add(const float4 &a, const float4 &b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

template <typename Tile>
__device__ void mainloop(const Block &block, const ProductParams &product, bool new_squares, unsigned sums_phase,
                         PipelineState &state) {
    constexpr int kRowGroups = Tile::kSquares / 8;
    const Product &a = product.a;
    const SharedHeader &header = block.header;
    const int warp = threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int rows = block.rows;
    const int group = lane / 4;
    const int member = lane % 4;
    const int first_box = warp % Tile::kColumnWarps * Tile::kOwnBoxes;
    const int first_part = warp / Tile::kColumnWarps * Tile::kParts;
    const bool norm = a.norm_weight != nullptr;
    const bool sums_squares = new_squares && first_part == 0;
    // Where this lane's rows of matrices start in a stage. TMA has swizzled the vectors: in line l of a box vector v is
    // at v xor l % 8, so the 8 rows of a matrix lie in different banks.
    const int in_matrix = lane % 8;
    const int matrix = lane / 8;
    const auto part_offset = [&](int part) {
        constexpr int kHalf = Tile::kTile / 2;
        const int place = !a.swiglu       ? first_box * Tile::kTile + part
                          : part < kHalf ? first_box * kHalf + part
                                         : (Tile::kBoxes + first_box - 1) * kHalf + part;
        return (place * kMmaRows + in_matrix) * kBoxBytes + (matrix ^ in_matrix) * kVectorBytes;
    };
    constexpr int kLow = Tile::kParts / 2;  // with SwiGLU the parts of a warp may be half gate, half up projection
    const int low_offset = part_offset(first_part);
    const int high_offset = part_offset(first_part + kLow) - kLow * kMmaRows * kBoxBytes;
    const int box_bytes = (a.swiglu ? Tile::kRows / 2 : Tile::kRows) * kBoxBytes;
    // Rows of x behind the last one repeat it: nothing reads their results.
    const auto input_offset = [&](int box, int row, int vector) {
        const int line = box * rows + min(row, rows - 1);
        return Tile::kWeightBytes + line * kBoxBytes + (vector ^ line % 8) * kVectorBytes;
    };

    const int item = header.item[state.stage];
    const int end = a.in_features / Tile::kBoxColumns * (item % product.splits + 1) / product.splits;
    float sum[Tile::kAccumulators][Tile::kRowTiles][Tile::kParts][4] = {};
    float square[kRowGroups][4] = {};
#pragma unroll 1
    for (int box = header.box[state.stage]; box < end; box += Tile::kBoxes) {
        wait(block.full(state), state.phase);
        const unsigned stage = block.stage(state);
        const int norm_offset = Tile::kWeightBytes + rows * Tile::kInputBytes;
#pragma unroll
        for (int own = 0; own < Tile::kOwnBoxes; ++own) {
            const int box_of_stage = first_box + own;
            if (box + box_of_stage >= end) {
                break;
            }
            const auto weights_of = [&](int half, int part) {
                return stage + ((part < kLow ? low_offset : high_offset) ^ half * 4 * kVectorBytes) +
                       part * kMmaRows * kBoxBytes + own * box_bytes;
            };
            const unsigned norm_weights = stage + norm_offset + box_of_stage * Tile::kBoxColumns * 2;
            if constexpr (Tile::kWide) {
                // All loads are issued before the first is used.
                unsigned input[4][Tile::kRowTiles][4];
                unsigned norm_weight[2][4];
                unsigned weight[2][Tile::kParts][4];
                if constexpr (kRowGroups == 1) {
                    // Four vectors of 8 rows, of two steps. The other 8 rows of a tensor core product count nowhere.
                    const int offset = input_offset(box_of_stage, in_matrix, matrix);
#pragma unroll
                    for (int k = 0; k < 4; k += 2) {
                        unsigned vectors[4];
                        load_matrices(vectors, stage + (offset ^ k * 2 * kVectorBytes));
                        input[k][0][0] = vectors[0];
                        input[k][0][2] = vectors[1];
                        input[k + 1][0][0] = vectors[2];
                        input[k + 1][0][2] = vectors[3];
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < Tile::kRowTiles; ++j) {
                        const int offset =
                            input_offset(box_of_stage, j * 16 + matrix % 2 * 8 + in_matrix, matrix / 2);
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            load_matrices(input[k][j], stage + (offset ^ k * 2 * kVectorBytes));
                        }
                    }
                }
                if (norm) {
                    load_matrices(norm_weight[0], norm_weights + matrix * kVectorBytes);
                    load_matrices(norm_weight[1], norm_weights + (4 + matrix) * kVectorBytes);
                }
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int part = 0; part < Tile::kParts; ++part) {
                        load_matrices(weight[half][part], weights_of(half, part));
                    }
                }
                if (norm) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const unsigned lower = norm_weight[k / 2][k % 2 * 2];
                        const unsigned upper = norm_weight[k / 2][k % 2 * 2 + 1];
#pragma unroll
                        for (int j = 0; j < Tile::kRowTiles; ++j) {
                            unsigned(&x)[4] = input[k][j];
                            if (sums_squares) {
                                if constexpr (kRowGroups == 1) {
                                    x[1] = x[0];
                                    x[3] = x[2];
                                    multiply_add_bf16(square[0], x, x[0], x[2]);
                                } else {
                                    multiply_add_bf16(square[2 * j], x, x[0], x[2]);
                                    multiply_add_bf16(square[2 * j + 1], x, x[1], x[3]);
                                }
                            }
                            x[0] = multiply_pairs(x[0], lower);
                            x[2] = multiply_pairs(x[2], upper);
                            if constexpr (kRowGroups > 1) {
                                x[1] = multiply_pairs(x[1], lower);
                                x[3] = multiply_pairs(x[3], upper);
                            }
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if constexpr (kRowGroups == 1) {
                        input[k][0][1] = input[k][0][0];
                        input[k][0][3] = input[k][0][2];
                    }
#pragma unroll
                    for (int part = 0; part < Tile::kParts; ++part) {
                        const unsigned(&columns)[4] = weight[k / 2][part];
#pragma unroll
                        for (int j = 0; j < Tile::kRowTiles; ++j) {
                            multiply_add_bf16(sum[k % Tile::kAccumulators][j][part], input[k][j], columns[k % 2 * 2],
                                              columns[k % 2 * 2 + 1]);
                        }
                    }
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint2 norm_weight[4];
                    uint2 pairs[4][kRowGroups];
                    unsigned weight[Tile::kParts][4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        // A lane's 4 columns in a matrix of W, which are 8 bytes of x.
                        if (norm) {
                            norm_weight[k] = load_shared(norm_weights + ((half * 4 + k) * 16 + member * 4) * 2);
                        }
#pragma unroll
                        for (int g = 0; g < kRowGroups; ++g) {
                            pairs[k][g] = load_shared(
                                stage + member % 2 * 8 +
                                input_offset(box_of_stage * 2 + half, g * 8 + group, k * 2 + member / 2));
                        }
                    }
#pragma unroll
                    for (int part = 0; part < Tile::kParts; ++part) {
                        load_matrices(weight[part], weights_of(half, part));
                    }
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        uint2 factor = make_uint2(kFactorOfPair, kFactorOfPair);
                        if (norm) {
                            factor.x = multiply_pairs(norm_weight[k].x, kFactorOfPair);
                            factor.y = multiply_pairs(norm_weight[k].y, kFactorOfPair);
                        }
                        unsigned input[Tile::kRowTiles][4];
#pragma unroll
                        for (int g = 0; g < kRowGroups; ++g) {
                            const uint2 pair = pairs[k][g];
                            if (sums_squares) {
                                unsigned both[4] = {pair.x, pair.x, pair.y, pair.y};
                                multiply_add_bf16(square[g], both, pair.x, pair.y);
                            }
                            const unsigned first = multiply_pairs(pair.x, factor.x);
                            const unsigned second = multiply_pairs(pair.y, factor.y);
                            input[g / 2][g % 2] = __byte_perm(first, second, 0x5410);
                            input[g / 2][2 + g % 2] = __byte_perm(first, second, 0x7632);
                        }
                        if constexpr (kRowGroups == 1) {
                            input[0][1] = input[0][0];
                            input[0][3] = input[0][2];
                        }
#pragma unroll
                        for (int part = 0; part < Tile::kParts; ++part) {
                            unsigned even;
                            unsigned odd;
                            expand_fp8(weight[part][k], even, odd);
#pragma unroll
                            for (int j = 0; j < Tile::kRowTiles; ++j) {
                                multiply_add_bf16(sum[k % Tile::kAccumulators][j][part], input[j], even, odd);
                            }
                        }
                    }
                }
            }
        }
        __syncwarp();
        if (lane == 0) {
            arrive(block.empty(state));
        }
        state.advance(block.stages);
    }

    wait(shared_address(&header.sums_empty), sums_phase ^ 1);
#pragma unroll
    for (int j = 0; j < Tile::kRowTiles; ++j) {
#pragma unroll
        for (int part = 0; part < Tile::kParts; ++part) {
            float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int set = 0; set < Tile::kAccumulators; ++set) {
                const float *values = sum[set][j][part];
                total = add(total, make_float4(values[0], values[1], values[2], values[3]));
            }
            block.sums[warp * Tile::kVectors + (j * Tile::kParts + part) * kWarp + lane] = total;
        }
    }
    if (sums_squares && member == group / 2) {
        // The diagonal: row and column are `group` where the column's lane is group / 2.
#pragma unroll
        for (int g = 0; g < kRowGroups; ++g) {
            const float lower = group % 2 == 1 ? square[g][1] : square[g][0];
            const float upper = group % 2 == 1 ? square[g][3] : square[g][2];
            // With FP8 weights both halves of the 16 rows are the same 8.
            block.squares[warp % Tile::kColumnWarps * Tile::kSquares + g * 8 + group] =
                Tile::kWide && g % 2 == 1 ? upper : lower;
        }
    }
    __syncwarp();
    if (lane == 0) {
        arrive(shared_address(&header.sums_full));
    }
}

}  // namespace llama_te::gemv
