// Rotary embedding of queries and keys, fused with the append of keys and values to the cache, on the GPU.
//
// The kernel reads a token's qkv once and writes each result once, 16 bytes at a time. A thread holds the two vectors of
// a head that rotate into each other, elements [8 j, 8 j + 8) of both halves (of 2-byte elements), so threads exchange
// nothing. With enough tokens to fill the GPU a thread takes 4 heads of one token: all their loads are in flight before
// the first is used, and it loads the cosines and sines, twice a vector's bytes, once for all of them.
//
// For an FP8 cache the threads of a head need its greatest number. So a head has a power of two of lanes, of which some hold
// nothing where the head's vectors are no power of two, and no head lies in two warps.

#include "append_rope.h"

#include "include/e4m3.cuh"
#include "include/e4m3.h"
#include "include/launch.cuh"
#include "include/rope.cuh"
#include "include/warp.cuh"

namespace llama_te {

namespace {

constexpr int kPromptHeads = 4;  // of one thread, in a prompt
constexpr int kPromptThreads = 256;
// A decoding step ends sooner when its few tokens are spread over more multiprocessors.
constexpr int kStepThreads = 128;

// Division by a multiplication. Exact for dividend * divisor < 2^32; heads and threads of a block are far below.
struct Divisor {
    unsigned value;
    unsigned inverse;

    explicit Divisor(int divisor)
        : value(static_cast<unsigned>(divisor)),
          inverse(static_cast<unsigned>((0x100000000ULL + value - 1) / value)) {}

    __device__ int divide(int dividend) const {
        // The inverse of 1, 2^32, does not fit and is 0.
        return value == 1 ? dividend : static_cast<int>(__umulhi(static_cast<unsigned>(dividend), inverse));
    }
};

struct Shape {
    Divisor vectors;         // of half a head
    Divisor heads_of_group;  // query heads, key and value
    int heads_of_block;
    int head_step;  // from one head of a thread to its next
    Divisor lanes;  // of a head

    Shape(int vectors_, int heads_of_group_, int heads_of_block_, int head_step_, int lanes_)
        : vectors(vectors_),
          heads_of_group(heads_of_group_),
          heads_of_block(heads_of_block_),
          head_step(head_step_),
          lanes(lanes_) {}
};

struct TokenPlace {
    int row;       // -1: the token is padding
    int position;  // in its row
};

// Finds the row of a packed token: the number of rows that end at or before it. Each lane of a warp looks at one of 32
// rows, or of 32 ranges of rows: one round for up to 32 rows, two for up to 1024. The last round loads `start` together
// with the ends, instead of after them.
__device__ TokenPlace find_packed(const AppendArguments &a, int token) {
    const int lane = threadIdx.x % kWarp;
    int first = 0;
    int span = a.rows;
    while (span > kWarp) {
        const int range = (span + kWarp - 1) / kWarp;
        const int end = min(first + (lane + 1) * range, a.rows);
        const int before = __popc(__ballot_sync(kWholeWarp, a.cu_new[end] <= token));
        first = min(first + before * range, a.rows);
        span = min(range, a.rows - first);
    }
    int begin = 0;
    int end = 0;
    int start = 0;
    if (lane < span) {
        begin = a.cu_new[first + lane];
        end = a.cu_new[first + lane + 1];
        start = a.start[first + lane];
    }
    const int before = __popc(__ballot_sync(kWholeWarp, lane < span && end <= token));
    const int source_lane = min(before, kWarp - 1);
    begin = __shfl_sync(kWholeWarp, begin, source_lane);
    start = __shfl_sync(kWholeWarp, start, source_lane);
    return before < span ? TokenPlace{first + before, start + token - begin} : TokenPlace{-1, 0};
}

__device__ TokenPlace find_padded(const AppendArguments &a, int token) {
    const int row = token / a.width;
    const int column = token - row * a.width;
    const int begin = a.cu_new[row];
    const int end = a.cu_new[row + 1];
    const int start = a.start[row];
    return column < end - begin ? TokenPlace{row, start + column} : TokenPlace{-1, 0};
}

// Rounds a key or value to FP8, and writes it to `to` and its scale to `scale`. All lanes of the head call it; those behind
// its last vector hold nothing.
__device__ void append_fp8(const uint4 (&held)[2], bool holds, const Shape &shape, int vector, char *to,
                           std::uint8_t *scale) {
    constexpr int kBytes = kPackedElements;  // of a vector in FP8
    const int lanes = static_cast<int>(shape.lanes.value);
    const unsigned first_lane = threadIdx.x % kWarp & ~(shape.lanes.value - 1);
    const unsigned lanes_of_head = ((1U << lanes) - 1) << first_lane;
    unsigned greatest = holds ? max(greatest_bits_of(held[0]), greatest_bits_of(held[1])) : 0;
    for (int distance = 1; distance < lanes; distance *= 2) {
        greatest = max(greatest, __shfl_xor_sync(lanes_of_head, greatest, distance));
    }
    const unsigned chosen = scale_of_greatest(greatest);
    const float inverse = __uint_as_float(bits_of_inverse_scale(chosen));
    if (holds) {
        to += vector * kBytes;
        *reinterpret_cast<uint2 *>(to) = quantized(held[0], inverse);
        *reinterpret_cast<uint2 *>(to + shape.vectors.value * kBytes) = quantized(held[1], inverse);
    }
    if (vector == 0) {
        *scale = static_cast<std::uint8_t>(chosen);
    }
}

// threadIdx.x goes over the lanes of one token, rounded up to whole warps, and threadIdx.y over the block's tokens.
// blockIdx.x goes over tokens, and blockIdx.y over heads where one block does not take all of them.
template <ElementType kElement, bool kFp8, int kHeads>
__global__ void __launch_bounds__(kPromptThreads)
    append_rope_kernel(const __grid_constant__ AppendArguments a, const __grid_constant__ Shape shape) {
    constexpr int kElements = Vector<kElement>::kElements;
    const int token = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
    const Divisor &lanes = kFp8 ? shape.lanes : shape.vectors;
    const int head_of_block = lanes.divide(threadIdx.x);
    const int vector = threadIdx.x - head_of_block * static_cast<int>(lanes.value);
    const int vector_bytes_in = vector * kVectorBytes;
    const int half_bytes = static_cast<int>(shape.vectors.value) * kVectorBytes;
    const int head_bytes = 2 * half_bytes;
    const int first_head = blockIdx.y * shape.heads_of_block + head_of_block;
    const int end_head = min(a.heads(), static_cast<int>(blockIdx.y + 1) * shape.heads_of_block);

    wait_for_previous_kernel();  // nothing above reads memory
    if (token >= a.tokens) {
        return;  // a whole warp: its threads share the token
    }
    const bool active = head_of_block < shape.head_step;
    const bool holds = active && (!kFp8 || vector < static_cast<int>(shape.vectors.value));

    uint4 held[kHeads][2];
    const auto load = [&] {
        const char *from = a.qkv + token * a.qkv_token_stride + vector_bytes_in;
#pragma unroll
        for (int i = 0; i < kHeads; ++i) {
            const int head = first_head + i * shape.head_step;
            if (holds && head < end_head) {
                const char *head_from = from + head * head_bytes;
                held[i][0] = __ldcs(reinterpret_cast<const uint4 *>(head_from));
                held[i][1] = __ldcs(reinterpret_cast<const uint4 *>(head_from + half_bytes));
            }
        }
    };

    // In a decoding step latency counts: these loads need not wait for the search of the row. In a prompt other warps
    // hide the latency, and the kernel skips the loads of padding.
    if constexpr (kHeads == 1) {
        load();
    }
    const TokenPlace place = a.width > 0 ? find_padded(a, token) : find_packed(a, token);
    int block = 0;
    int block_place = 0;
    const bool exists = place.row >= 0 && place.position < a.positions &&
                        a.index.find(place.row, place.position, block, block_place);
    if constexpr (kHeads != 1) {
        if (exists) {
            load();
        }
    }
    if (!active) {
        return;
    }

    float cosine[kElements];
    float sine[kElements];
    if (exists && holds) {
        const char *row = a.cos_sin + place.position * a.cos_sin_stride;
        constexpr int kFloatBytes = kElements * static_cast<int>(sizeof(float));
        const char *from = row + vector_bytes_in / kVectorBytes * kFloatBytes;
        load_floats(from, cosine);
        load_floats(from + shape.vectors.value * kFloatBytes, sine);
    }
    char *const key = a.key.at(block, block_place);
    char *const value = a.value.at(block, block_place);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int head = first_head + i * shape.head_step;
        if (head >= end_head) {
            continue;
        }
        const int kv_head = shape.heads_of_group.divide(head);
        const int head_of_group = head - kv_head * static_cast<int>(shape.heads_of_group.value);
        if constexpr (kFp8) {
            if (exists && head_of_group >= a.group) {
                const bool is_key = head_of_group == a.group;
                if (is_key && holds) {
                    rotate<kElement>(held[i][0], held[i][1], cosine, sine);
                }
                const CacheScales &scales = is_key ? a.key_scale : a.value_scale;
                char *const head_of_cache =
                    is_key ? key + kv_head * a.key.head_stride : value + kv_head * a.value.head_stride;
                append_fp8(held[i], holds, shape, vector, head_of_cache, scales.at(block, kv_head, block_place));
                continue;
            }
            if (!holds) {
                continue;
            }
        }
        char *to = a.query_head(token, kv_head, head_of_group);
        if (!exists) {
            if (head_of_group >= a.group) {
                continue;
            }
            held[i][0] = make_uint4(0, 0, 0, 0);
            held[i][1] = make_uint4(0, 0, 0, 0);
        } else if (head_of_group <= a.group) {
            rotate<kElement>(held[i][0], held[i][1], cosine, sine);
            if (head_of_group == a.group) {
                to = key + kv_head * a.key.head_stride;
            }
        } else {
            to = value + kv_head * a.value.head_stride;
        }
        to += vector_bytes_in;
        *reinterpret_cast<uint4 *>(to) = held[i][0];
        *reinterpret_cast<uint4 *>(to + half_bytes) = held[i][1];
    }
}

template <ElementType kElement, bool kFp8, int kHeads>
void launch(const AppendArguments &a, int vectors, int most_threads, cudaStream_t stream) {
    int lanes = vectors;
    if (kFp8) {
        for (lanes = 1; lanes < vectors;) {
            lanes *= 2;
        }
    }
    const int heads_of_block = [&] {
        const int most = most_threads / lanes * kHeads;
        return a.heads() < most ? a.heads() : most;
    }();
    const int head_step = divide_up(heads_of_block, kHeads);
    const int threads = round_up(head_step * lanes, kWarp);
    const int tokens = kHeads == 1 ? 1 : most_threads / threads;
    const Shape shape(vectors, a.group + 2, heads_of_block, head_step, lanes);

    const dim3 grid(static_cast<unsigned>(divide_up<std::int64_t>(a.tokens, tokens)),
                    divide_up(a.heads(), heads_of_block));
    launch_overlapping(append_rope_kernel<kElement, kFp8, kHeads>, {grid, dim3(threads, tokens)}, stream, "append_rope", a,
                       shape);
}

template <ElementType kElement, bool kFp8>
void choose_heads(const AppendArguments &a, int device, cudaStream_t stream) {
    const int vectors = a.head_bytes() / 2 / kVectorBytes;
    const std::int64_t pairs = a.tokens * a.heads() * vectors;
    // While the GPU holds all pairs of vectors at once, one to a thread, more work per thread only takes longer.
    if (pairs <= static_cast<std::int64_t>(multiprocessors(device)) * 1024) {
        launch<kElement, kFp8, 1>(a, vectors, kStepThreads, stream);
    } else {
        launch<kElement, kFp8, kPromptHeads>(a, vectors, kPromptThreads, stream);
    }
}

}  // namespace

void append_rope_cuda(const AppendArguments &arguments, int device, std::uintptr_t stream) {
    const DeviceGuard guard(device);
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (arguments.is_fp8()) {
        choose_heads<ElementType::kBFloat16, true>(arguments, device, cuda_stream);
        return;
    }
    dispatch("append_rope", Elements{}, arguments.element,
             [&](auto element) { choose_heads<element.value, false>(arguments, device, cuda_stream); });
}

}  // namespace llama_te
