// The epilogue: adds up the sums of a work item in a fixed order and turns them into the product's result.

#pragma once

#include "config.cuh"
#include "include/vector.cuh"
#include "mainloop.cuh"
#include "producer.cuh"

namespace llama_te::gemv {

using Bf16 = Pair<ElementType::kBFloat16>;

__device__ inline float round_bf16(float value) {
    return __bfloat162float(__float2bfloat16_rn(value));
}

// An epilogue warp takes 8 rows of W and 16 rows of x at a time. Where the columns of a tile are split over blocks, each
// block writes its partial sums, and the block that reaches the tile's semaphore last adds them up.
template <typename Config>
__device__ void epilogue(const Block &block, const ProductParams &product, int item, bool counts, unsigned phase) {
    const Product &a = product.a;
    SharedHeader &header = block.header;
    const int thread = threadIdx.x - Config::kFirstEpilogueWarp * kWarp;
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    const int rows = block.rows;
    const int splits = product.splits;
    const int tile = item / splits;
    const bool norm = a.norm_weight != nullptr;
    const bool small = product.tile == Config::kSmallTile;
    const auto sync_epilogue = [] { asm volatile("bar.sync 1, %0;" ::"n"(Config::kEpilogueWarps * kWarp) : "memory"); };
    const auto release_sums = [&] {
        __syncwarp();
        if (lane == 0) {
            arrive(shared_address(&header.sums_empty));
        }
    };

    // The part of the tile and the 16 rows of x that this warp has next. A lane has 2 features of 2 rows of them.
    const int parts = a.swiglu ? product.tile / 2 : product.tile;
    const int features = a.swiglu ? a.out_features / 2 : a.out_features;
    struct Place {
        int part;
        int row_tile;
        int row;
        int feature;
    };
    const auto place_of = [&](int i) {
        const int row_tile = Config::kRowTiles > 1 && i >= parts ? 1 : 0;
        const int part = i - row_tile * parts;
        return Place{part, row_tile, row_tile * 16 + lane / 4, (tile * parts + part) * kMmaRows + lane % 4 * 2};
    };
    // The residual of the first place is loaded while the math warps still work.
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
    if (warp < Config::kRowTiles * parts) {
        load_residual(place_of(warp));
    }

    wait(shared_address(&header.sums_full), phase);
    const auto sum_of = [&](auto tile_config, int part, int row_tile) {
        using Tile = decltype(tile_config);
        const float4 *first = block.sums + part / Tile::kParts * Tile::kColumnWarps * Tile::kVectors +
                              (row_tile * Tile::kParts + part % Tile::kParts) * kWarp + lane;
        float4 total = first[0];
#pragma unroll
        for (int k = 1; k < Tile::kColumnWarps; ++k) {
            total = add(total, first[k * Tile::kVectors]);
        }
        return total;
    };
    const auto block_total = [&](int part, int row_tile) {
        return small ? sum_of(TileConfig<Config, Config::kSmallTile>{}, part, row_tile)
                     : sum_of(TileConfig<Config, Config::kLargeTile>{}, part, row_tile);
    };
    const auto block_square = [&](int row) {
        const int warps = small ? TileConfig<Config, Config::kSmallTile>::kColumnWarps
                                : TileConfig<Config, Config::kLargeTile>::kColumnWarps;
        float total = 0;
#pragma unroll 4
        for (int k = 0; k < warps; ++k) {
            total += block.squares[k * Config::kSquares + row];
        }
        return total;
    };
    const int tile_vectors = Config::kRowTiles * product.tile * kWarp;
    const int partial_floats = tile_vectors * 4 + Config::kSquares;  // of one split of a tile
    const float *const partials = a.partials + static_cast<std::int64_t>(tile) * splits * partial_floats;
    const auto vector_of = [&](int part, int row_tile) { return (row_tile * product.tile + part) * kWarp + lane; };
    const bool new_squares = header.new_squares[phase];
    if (splits > 1) {
        float *const own = a.partials + static_cast<std::int64_t>(item) * partial_floats;
#pragma unroll 2
        for (int part = warp; part < product.tile; part += Config::kEpilogueWarps) {
#pragma unroll
            for (int row_tile = 0; row_tile < Config::kRowTiles; ++row_tile) {
                if (row_tile * 16 + lane / 4 < rows) {
                    __stcg(reinterpret_cast<float4 *>(own) + vector_of(part, row_tile), block_total(part, row_tile));
                }
            }
        }
        if (norm && thread < rows) {
            __stcg(own + tile_vectors * 4 + thread, block_square(thread));
        }
        release_sums();
        __threadfence();
        sync_epilogue();
        if (thread == 0) {
            header.last = atomicAdd(a.semaphores + tile, 1) == splits - 1;
            if (header.last) {
                a.semaphores[tile] = 0;  // for the next launch
            }
            __threadfence();
        }
        sync_epilogue();
        if (!header.last) {
            return;
        }
    }
    if (new_squares) {
        sync_epilogue();  // no thread still reads the factors of the previous product
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
            header.factor[thread] = rsqrtf(total / static_cast<float>(a.in_features) + a.epsilon);
        }
        sync_epilogue();
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
    const float weight_scale = Config::kWide ? 1.0F : __ldg(a.scale) * kFactorOfSum;
#pragma unroll 1
    for (int i = warp; i < Config::kRowTiles * parts; i += Config::kEpilogueWarps) {
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
            const float factor = norm ? weight_scale * header.factor[row] : weight_scale;
            // Each result is rounded where a layer of single operations would round it.
            float x = round_bf16((upper ? value.z : value.x) * factor);
            float y = round_bf16((upper ? value.w : value.y) * factor);
            if (a.swiglu) {
                x = __fdividef(x, 1.0F + __expf(-x)) * round_bf16((upper ? other.z : other.x) * factor);
                y = __fdividef(y, 1.0F + __expf(-y)) * round_bf16((upper ? other.w : other.y) * factor);
            } else if (a.residual != nullptr) {
                const float2 before = Bf16::unpack(residual[upper]);
                x += before.x;
                y += before.y;
            }
            *reinterpret_cast<unsigned *>(a.output + (static_cast<std::int64_t>(row) * features + place.feature) * 2) =
                Bf16::pack(x, y);
        }
    }
    if (splits == 1) {
        release_sums();
    }
    __syncwarp();
    if (counts && lane == 0) {
        release_and_count(product.finished_tiles);
    }
}

}  // namespace llama_te::gemv
