// The choice of a product's tile and of its number of splits (split-K).

#pragma once

#include "include/integer.h"
#include "linear.h"

namespace llama_te::gemv {

struct TileChoice {
    int tile;  // times 8 rows of W
    int splits;
};

// Blocks work on tiles in rounds. The cost of a tile is the bytes that it reads plus a constant; x comes from the L2
// cache and counts less. The numbers were measured on an H200.
template <typename Config>
TileChoice choose_tile(const Product &a, int multiprocessors) {
    constexpr int kRowsOfMma = 8;
    const double element = a.weight_type == WeightType::kBFloat16 ? 2 : 1;
    TileChoice best = {0, 1};
    double least = 0;
    for (const int tile : {Config::kSmallTile, Config::kLargeTile}) {
        const int tiles = divide_up(a.out_features, tile * kRowsOfMma);
        for (int splits = 1; splits <= 8; splits *= 2) {
            if (splits > 1 && (tiles * splits > multiprocessors || a.in_features / splits < 512)) {
                break;
            }
            const auto rounds = static_cast<double>(divide_up<std::int64_t>(std::int64_t{tiles} * splits,
                                                                             multiprocessors));
            const double read = (tile * kRowsOfMma * element + 0.3 * a.rows * 2) * a.in_features / splits;
            const double cost = rounds * (read + 16e3) + (splits > 1 ? 150e3 + splits * a.rows * tile * 64.0 : 0);
            if (best.tile == 0 || cost < least) {
                best = {tile, splits};
                least = cost;
            }
        }
    }
    return best;
}

}  // namespace llama_te::gemv
