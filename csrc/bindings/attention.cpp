// decode_attention. A build without CUDA has its checks and the size of its workspace alone: on a CPU, PyTorch attends.

#include <limits>

#include "arguments.h"
#include "attention/decode_attention.h"
#include "cache/append_rope.h"

namespace llama_te::bindings {

namespace {

DecodeAttentionArguments decode_attention_arguments(
    int element, Address qkv, std::int64_t qkv_row_stride, std::int32_t rows, std::int32_t kv_heads, std::int32_t group,
    std::int32_t head_dim, Address cos_sin, std::int64_t cos_sin_stride, std::int32_t positions, Address start,
    const Table &page_table, std::int32_t capacity, std::int32_t blocks, std::int32_t block_places, const Memory &key,
    const Memory &value, float scale, Address output, Address workspace) {
    return {static_cast<ElementType>(element),
            pointer<const char>(qkv),
            qkv_row_stride,
            rows,
            kv_heads,
            group,
            head_dim,
            pointer<const char>(cos_sin),
            cos_sin_stride,
            positions,
            pointer<const std::int32_t>(start),
            index_of(page_table, capacity, blocks, block_places),
            memory_of(key),
            memory_of(value),
            scale,
            pointer<char>(output),
            pointer<std::int32_t>(workspace)};
}

}  // namespace

void bind_attention(py::module_ &module) {
    const auto define_attention = [&](const char *name, auto function, auto... first) {
        define(module, name, function, first..., "element", "qkv", "qkv_row_stride", "rows", "kv_heads", "group",
               "head_dim", "cos_sin", "cos_sin_stride", "positions", "start", "page_table", "capacity", "blocks",
               "block_places", "key", "value", "scale", "output", "workspace");
    };
    const auto workspace = [](py::handle rows, py::handle kv_heads, py::handle group, py::handle head_dim,
                              py::handle capacity) {
        const auto size = [](const char *name, py::handle value, std::int32_t most) {
            return static_cast<std::int32_t>(integer(name, value, 0, most));
        };
        return decode_attention_workspace(
            size("rows", rows, kMaxDecodeRows), size("kv_heads", kv_heads, kMaxDecodeKvHeads),
            size("group", group, kMaxDecodeGroup), size("head_dim", head_dim, kMaxHeadDim),
            size("capacity", capacity, std::numeric_limits<std::int32_t>::max()));
    };
    define(module, "decode_attention_workspace", workspace, "rows", "kv_heads", "group", "head_dim", "capacity");
    define_attention("decode_attention_check",
                     on_host<DecodeAttentionArguments>(decode_attention_arguments, check_layout));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_attention("decode_attention_cuda", on_gpu(decode_attention_arguments, decode_attention_cuda), "device",
                     "stream");
#endif
}

}  // namespace llama_te::bindings
