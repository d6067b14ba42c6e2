// The operators on the CPU: plain loops, so that a laptop and CI run what the models run, and the GPU's oracle.

#include <cstring>
#include <vector>

#include "kernels.h"

namespace llama_te {

namespace {

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Float32 {
    float value;

    double get() const {
        return value;
    }
    void set(double wide) {
        value = static_cast<float>(wide);
    }
};

struct BFloat16 {
    std::uint16_t bits;

    double get() const {
        return float_of(static_cast<std::uint32_t>(bits) << 16);
    }
    void set(double wide) {
        const std::uint32_t whole = bits_of(static_cast<float>(wide));
        const bool is_nan = (whole & 0x7fffffffU) > 0x7f800000U;  // rounding could carry a NaN over to an infinity
        bits = static_cast<std::uint16_t>(is_nan ? (whole >> 16) | 0x40U
                                                 : (whole + 0x7fffU + ((whole >> 16) & 1U)) >> 16);
    }
};

struct Float16 {
    std::uint16_t bits;

    double get() const {
        const std::uint32_t sign = (bits & 0x8000U) << 16;
        const std::uint32_t exponent = (bits >> 10) & 0x1fU;
        const std::uint32_t mantissa = bits & 0x3ffU;
        if (exponent == 0) {
            const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
            return float_of(bits_of(magnitude) | sign);
        }
        const std::uint32_t wide = exponent == 0x1fU ? 0xffU : exponent + 112;
        return float_of(sign | wide << 23 | mantissa << 13);
    }
    void set(double value) {
        const std::uint32_t whole = bits_of(static_cast<float>(value));
        const std::uint32_t sign = (whole >> 16) & 0x8000U;
        std::uint32_t magnitude = whole & 0x7fffffffU;
        if (magnitude >= 0x47800000U) {  // 65536 and beyond
            magnitude = magnitude > 0x7f800000U ? 0x7e00U : 0x7c00U;
        } else if (magnitude < 0x38800000U) {
            // Less than 2^-14: float32's own addition rounds to multiples of 2^-24, as half precision has them here.
            magnitude = bits_of(float_of(magnitude) + 0.5F) - 0x3f000000U;
        } else {
            magnitude = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
        }
        bits = static_cast<std::uint16_t>(sign | magnitude);
    }
};

// Products of two float32 numbers are exact in double precision, so that only the final rounding counts.
template <typename Element>
void rotate(const char *from, const float *cos_sin, char *to, int head_dim) {
    const Element *in = reinterpret_cast<const Element *>(from);
    Element *out = reinterpret_cast<Element *>(to);
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        const double cosine = cos_sin[i];
        const double sine = cos_sin[half + i];
        const double first = in[i].get();
        const double second = in[half + i].get();
        out[i].set(first * cosine - second * sine);
        out[half + i].set(second * cosine + first * sine);
    }
}

template <typename Element>
void append(const AppendArguments &a) {
    const int head_bytes = a.head_bytes();
    std::int32_t row = 0;
    for (std::int64_t token = 0; token < a.tokens; ++token) {
        std::int64_t place_in_row;
        bool exists;
        if (a.width > 0) {
            row = static_cast<std::int32_t>(token / a.width);
            place_in_row = token % a.width;
            exists = place_in_row < a.cu_new[row + 1] - a.cu_new[row];
        } else {
            while (row < a.rows && a.cu_new[row + 1] <= token) {
                ++row;
            }
            exists = row < a.rows;
            place_in_row = exists ? token - a.cu_new[row] : 0;
        }
        if (!exists) {
            std::memset(a.query_head(token, 0, 0), 0, static_cast<std::size_t>(a.kv_heads) * a.group * head_bytes);
            continue;
        }
        const std::int32_t position = a.start[row] + static_cast<std::int32_t>(place_in_row);
        std::int32_t block;
        std::int32_t block_place;
        a.index.find(row, position, block, block_place);  // found: check_values has run
        const float *cos_sin = reinterpret_cast<const float *>(a.cos_sin + position * a.cos_sin_stride);
        const char *from = a.qkv + token * a.qkv_token_stride;
        for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
            for (int head = 0; head < a.group; ++head, from += head_bytes) {
                rotate<Element>(from, cos_sin, a.query_head(token, kv_head, head), a.head_dim);
            }
            rotate<Element>(from, cos_sin, a.key.at(block, block_place) + kv_head * a.key.head_stride, a.head_dim);
            from += head_bytes;
            std::memcpy(a.value.at(block, block_place) + kv_head * a.value.head_stride, from, head_bytes);
            from += head_bytes;
        }
    }
}

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

// Piece by piece, each read from all rows before it is written to any.
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

void append_rope_cpu(const AppendArguments &arguments) {
    check_layout(arguments);
    check_values(arguments);
    switch (arguments.element) {
        case ElementType::kBFloat16:
            return append<BFloat16>(arguments);
        case ElementType::kFloat16:
            return append<Float16>(arguments);
        case ElementType::kFloat32:
            return append<Float32>(arguments);
    }
}

void reorder_rows_cpu(const ReorderArguments &arguments) {
    check_values(arguments);
    const std::vector<Move> moves = moves_of(arguments, row_move);
    for (int cache = 0; cache < arguments.cache_count; ++cache) {
        carry_out(arguments.caches[cache], moves, arguments.place_bytes);
    }
}

void reorder_pages_cpu(const ReorderArguments &arguments) {
    check_values(arguments);
    // The pages' moves are found in the table as it was.
    const std::vector<Move> moves = moves_of(arguments, page_move);
    carry_out(reinterpret_cast<char *>(arguments.table_entry(0, 0)), moves_of(arguments, table_move),
              sizeof(std::int32_t));
    for (int cache = 0; cache < arguments.cache_count; ++cache) {
        carry_out(arguments.caches[cache], moves, arguments.place_bytes);
    }
}

}  // namespace llama_te
