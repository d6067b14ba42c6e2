// append_rope on the CPU: plain loops. Laptops and CI run it, and the GPU's kernel is tested against it.

#include "cache/append_rope.h"
#include "cpu/numbers.h"
#include "cpu/read_once.h"
#include "include/e4m3.h"

#include <algorithm>
#include <cstring>

namespace llama_te {

namespace {

// Products of two float32 numbers are exact in double precision, so only the final rounding changes a result.
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

// Rounds a head of bfloat16 to e4m3 with a scale.
void quantize(const char *from, int head_dim, char *to, std::uint8_t *scale) {
    const BFloat16 *in = reinterpret_cast<const BFloat16 *>(from);
    E4M3 *out = reinterpret_cast<E4M3 *>(to);
    std::uint32_t greatest = 0;
    for (int i = 0; i < head_dim; ++i) {
        greatest = std::max(greatest, static_cast<std::uint32_t>(in[i].bits & 0x7fffU) << 16);
    }
    const std::uint32_t chosen = scale_of_greatest(greatest);
    const double inverse = float_of(bits_of_inverse_scale(chosen));
    for (int i = 0; i < head_dim; ++i) {
        out[i].set(in[i].get() * inverse);
    }
    *scale = static_cast<std::uint8_t>(chosen);
}

template <typename Element>
void append(const AppendArguments &a) {
    const int head_bytes = a.head_bytes();
    BFloat16 rotated[kMaxHeadDim];  // a key on its way to an FP8 cache
    std::int32_t row = 0;
    for (std::int64_t token = 0; token < a.tokens; ++token) {
        std::int64_t place_in_row;
        bool exists;
        if (a.width > 0) {
            row = static_cast<std::int32_t>(token / a.width);
            place_in_row = token % a.width;
            const std::int64_t first = read_once(a.cu_new[row]);
            exists = place_in_row < read_once(a.cu_new[row + 1]) - first;
        } else {
            while (row < a.rows && read_once(a.cu_new[row + 1]) <= token) {
                ++row;
            }
            exists = row < a.rows;
            place_in_row = exists ? token - read_once(a.cu_new[row]) : 0;
        }
        // check_values has run, but another thread may have written these numbers since then: never leave the cache.
        const std::int64_t position = exists ? read_once(a.start[row]) + place_in_row : 0;
        exists = exists && position >= 0 && position < a.positions;
        std::int32_t block;
        std::int32_t block_place;
        if (!exists || !a.index.find(row, static_cast<std::int32_t>(position), block, block_place)) {
            std::memset(a.query_head(token, 0, 0), 0, static_cast<std::size_t>(a.kv_heads) * a.group * head_bytes);
            continue;
        }
        const float *cos_sin = reinterpret_cast<const float *>(a.cos_sin + position * a.cos_sin_stride);
        const char *from = a.qkv + token * a.qkv_token_stride;
        for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head) {
            for (int head = 0; head < a.group; ++head, from += head_bytes) {
                rotate<Element>(from, cos_sin, a.query_head(token, kv_head, head), a.head_dim);
            }
            char *const key = a.key.at(block, block_place) + kv_head * a.key.head_stride;
            char *const value = a.value.at(block, block_place) + kv_head * a.value.head_stride;
            if (a.is_fp8()) {
                char *const held = reinterpret_cast<char *>(rotated);
                rotate<BFloat16>(from, cos_sin, held, a.head_dim);
                quantize(held, a.head_dim, key, a.key_scale.at(block, kv_head, block_place));
                quantize(from + head_bytes, a.head_dim, value, a.value_scale.at(block, kv_head, block_place));
            } else {
                rotate<Element>(from, cos_sin, key, a.head_dim);
                std::memcpy(value, from + head_bytes, head_bytes);
            }
            from += 2 * head_bytes;
        }
    }
}

}  // namespace

void append_rope_cpu(const AppendArguments &arguments) {
    check_values(arguments);
    dispatch("append_rope", Elements{}, arguments.element,
             [&](auto element) { append<typename Number<element.value>::Type>(arguments); });
}

}  // namespace llama_te
