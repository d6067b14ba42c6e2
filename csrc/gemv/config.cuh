// How a thread block divides its work: warps, tiles, stages of the pipeline, and shared memory.

#pragma once

#include <cstdint>

#include "include/element.h"
#include "include/tma.cuh"
#include "include/warp.cuh"
#include "linear.h"

namespace llama_te::gemv {

constexpr int kBoxBytes = kLinearRowBytes;  // of one row of W in a box of TMA
constexpr int kBoxVectors = kBoxBytes / kVectorBytes;
constexpr int kMmaRows = 8;  // rows of W of one tensor core product
constexpr int kNone = -1;

// A product as the kernel sees it.
struct ProductParams {
    CUtensorMap weight;
    CUtensorMap input;
    Product a;
    int tile;  // times 8 rows of W
    int tiles;
    int splits;                   // split-K: blocks that share the columns of a tile
    std::int32_t *drawn_items;    // counter of the work items that blocks have drawn, see producer.cuh
    std::int32_t *finished_tiles;  // counter of finished tiles; every epilogue warp counts

    // A work item is one split of one tile.
    __device__ int items() const {
        return tiles * splits;
    }
};

struct Params {
    ProductParams products[kMaxProducts];
    int count;
    std::int32_t *exits;  // counter of the blocks that no longer look at `finished_tiles`
};

// How the warps of a block share the work, for kRowGroups times 8 rows of x.
template <WeightType kWeight, int kRowGroups>
struct KernelConfig {
    static constexpr bool kWide = kWeight == WeightType::kBFloat16;
    static constexpr int kMathWarps = 8;
    static constexpr int kWeightProducerWarp = kMathWarps;
    static constexpr int kInputProducerWarp = kMathWarps + 1;
    // With few rows, warps of their own run the epilogue while the math warps go on. With many rows that is too much
    // work for a few warps, so all math warps do it.
    static constexpr bool kOwnEpilogueWarps = kRowGroups == 1;
    static constexpr int kEpilogueWarps = kOwnEpilogueWarps ? 2 : kMathWarps;
    static constexpr int kFirstEpilogueWarp = kOwnEpilogueWarps ? kMathWarps + 2 : 0;
    static constexpr int kThreads = (kMathWarps + 2 + (kOwnEpilogueWarps ? kEpilogueWarps : 0)) * kWarp;
    static constexpr int kElements = kWide ? 8 : 16;  // of a vector of W
    static constexpr int kBoxColumns = kElements * kBoxVectors;
    static constexpr int kInputBoxes = kElements / 8;                       // boxes of x for one box of W
    static constexpr int kRowTiles = kRowGroups == 1 ? 1 : kRowGroups / 2;  // of 16 rows of x
    static constexpr int kSquares = 8 * kRowGroups;                         // a sum of squares for each row of x
    // Sets of accumulators that take turns where one set would make products wait for each other.
    static constexpr int kAccumulators = kRowGroups == 1 ? 2 : 1;
    static constexpr int kWeightBytes = 32 * 1024;  // of W in a stage
    static constexpr int kMaxStages = 8;
    static constexpr int kHeaderBytes = 1024;  // of SharedHeader; boxes start at multiples of 1024 bytes
    // All shared memory of a multiprocessor, but less for a few rows with FP8 weights, where fewer stages are faster.
    static constexpr int kSharedBytes = (kRowGroups == 1 && !kWide ? 150 : 226) * 1024;
    static constexpr int kSumBytes = kMathWarps * kRowTiles * (32 / kMathWarps) * kWarp * 16;
    static constexpr int kTailBytes = kSumBytes + 16 * kSquares * 4;
    // Rows of W of a tile, times 8. There are two sizes only: code that runs seldom must first be loaded.
    static constexpr int kSmallTile = kRowGroups == 1 ? 2 : 8;
    static constexpr int kLargeTile = kRowGroups == 1 ? 4 : 16;

    // Boxes of a stage.
    __host__ __device__ static constexpr int boxes_of(int tile) {
        return kWeightBytes / (tile * kMmaRows * kBoxBytes);
    }
};

// A tile of kTile times 8 rows of W. A stage has as many columns as fill its bytes.
template <typename Config, int kTile_>
struct TileConfig : Config {
    static constexpr int kTile = kTile_;
    static constexpr int kRows = kTile * kMmaRows;
    static constexpr int kBoxes = Config::boxes_of(kTile);                                    // of a stage
    static constexpr int kOwnBoxes = kBoxes > Config::kMathWarps ? kBoxes / Config::kMathWarps : 1;  // of a warp
    static constexpr int kSharers = Config::kMathWarps > kBoxes ? Config::kMathWarps / kBoxes : 1;   // of a box
    static constexpr int kParts = kTile / kSharers;                       // of 8 rows of W, of a warp
    static constexpr int kColumnWarps = Config::kMathWarps / kSharers;    // that share a tile's columns
    static constexpr int kInputBytes = kBoxes * Config::kBoxColumns * 2;  // of a row of x in a stage
    static constexpr int kVectors = Config::kRowTiles * kParts * kWarp;   // of 4 sums, of a warp
    static_assert(Config::kMathWarps * kVectors * 16 <= Config::kSumBytes && kParts >= 2);
};

template <typename Config, typename Function>
__device__ void dispatch_tile(int tile, const Function &function) {
    if (tile == Config::kSmallTile) {
        function(TileConfig<Config, Config::kSmallTile>{});
    } else {
        function(TileConfig<Config, Config::kLargeTile>{});
    }
}

// The start of a block's shared memory. The stages of the pipeline, then the math warps' sums lie behind it.
struct SharedHeader {
    // Barriers of the stages: W is on its way, W and x are there, both were read.
    std::uint64_t issued[8];
    std::uint64_t full[8];
    std::uint64_t empty[8];
    // Of a stage:
    int product[8];  // kNone: the work has ended
    int item[8];     // a work item
    int box[8];      // its first box
    // Barriers of the sums: they are there, they were read.
    std::uint64_t sums_full;
    std::uint64_t sums_empty;
    // Of work items, in turns: the epilogue of an item may still run when the next item starts.
    std::uint64_t item_started[2];
    int epilogue_product[2];
    int epilogue_item[2];
    bool new_squares[2];
    bool last;
    float factor[kMaxLinearRows];  // of RMSNorm, for the product in the epilogue
};

// Shared memory and sizes that all threads of a block use.
struct Block {
    const Params &params;
    SharedHeader &header;
    unsigned stages_address;
    float4 *sums;    // [math warps, vectors of a warp]
    float *squares;  // [warps that share columns, rows of x]
    int stages;
    int stage_bytes;
    int rows;

    __device__ unsigned issued(const PipelineState &state) const {
        return shared_address(header.issued + state.stage);
    }
    __device__ unsigned full(const PipelineState &state) const {
        return shared_address(header.full + state.stage);
    }
    __device__ unsigned empty(const PipelineState &state) const {
        return shared_address(header.empty + state.stage);
    }
    __device__ unsigned stage(const PipelineState &state) const {
        return stages_address + state.stage * stage_bytes;
    }
};

}  // namespace llama_te::gemv
