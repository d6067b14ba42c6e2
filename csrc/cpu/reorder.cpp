// reorder_rows and reorder_pages on the CPU: plain loops.

#include "cache/reorder.h"

#include <cstring>
#include <vector>

namespace llama_te {

namespace {

using FindMove = bool (*)(const ReorderArguments &, int, Move &);

std::vector<Move> moves_of(const ReorderArguments &a, FindMove find) {
    std::vector<Move> moves;
    Move move;
    for (int row = 0; row < a.rows; ++row) {
        if (find(a, row, move)) {
            moves.push_back(move);
        }
    }
    return moves;
}

// Carries out the moves piece by piece: reads a piece of every source before it writes any.
void carry_out(char *data, const std::vector<Move> &moves, std::int64_t piece) {
    std::int64_t most = 0;
    for (const Move &move : moves) {
        most = move.bytes > most ? move.bytes : most;
    }
    std::vector<char> held(moves.size() * static_cast<std::size_t>(piece));
    for (std::int64_t at = 0; at < most; at += piece) {
        char *hold = held.data();
        for (const Move &move : moves) {
            if (at < move.bytes) {
                std::memcpy(hold, data + move.from + at, static_cast<std::size_t>(piece));
            }
            hold += piece;
        }
        hold = held.data();
        for (const Move &move : moves) {
            if (at < move.bytes) {
                std::memcpy(data + move.to + at, hold, static_cast<std::size_t>(piece));
            }
            hold += piece;
        }
    }
}

}  // namespace

void reorder_rows_cpu(const ReorderArguments &arguments) {
    check_values(arguments);
    const std::vector<Move> moves = moves_of(arguments, row_move);
    for (int cache = 0; cache < arguments.cache_count; ++cache) {
        carry_out(arguments.caches[cache], moves, arguments.place_bytes);
    }
}

void reorder_pages_cpu(const ReorderArguments &arguments) {
    check_values(arguments);
    // The moves of pages follow from the table before it changes.
    const std::vector<Move> moves = moves_of(arguments, page_move);
    const std::vector<Move> scale_moves = moves_of(arguments, scale_move);
    carry_out(reinterpret_cast<char *>(arguments.table_entry(0, 0)), moves_of(arguments, table_move),
              sizeof(std::int32_t));
    for (int cache = 0; cache < arguments.cache_count; ++cache) {
        carry_out(arguments.caches[cache], moves, arguments.place_bytes);
    }
    for (int scale = 0; scale < arguments.scale_count; ++scale) {
        carry_out(arguments.caches[arguments.cache_count + scale], scale_moves, arguments.scale_bytes);
    }
}

}  // namespace llama_te
