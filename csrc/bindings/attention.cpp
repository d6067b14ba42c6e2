// decode_attention. On a CPU PyTorch attends, after the rotation and the append, which are here.

#include <limits>

#include "attention/decode_attention.h"
#include "cache/append_rope.h"
#include "cached_tokens.h"

namespace llama_te::bindings {

namespace {

constexpr std::int32_t kMostPlaces = std::numeric_limits<std::int32_t>::max();

std::int64_t workspace_size(py::handle rows, py::handle kv_heads, py::handle group, py::handle head_dim,
                            py::handle capacity) {
    const auto size = [](const char *name, py::handle value, std::int32_t most) {
        return static_cast<std::int32_t>(integer({name}, value, 0, most));
    };
    return decode_attention_workspace(size("rows", rows, kMaxDecodeRows), size("kv_heads", kv_heads, kMaxDecodeKvHeads),
                                      size("group", group, kMaxDecodeGroup), size("head_dim", head_dim, kMaxHeadDim),
                                      size("capacity", capacity, kMostPlaces));
}

template <auto... kValues, typename Value>
bool has(Values<kValues...>, Value value) {
    return ((kValues == value) || ...);
}

template <int kFirst, int... kOthers>
std::string listed(Values<kFirst, kOthers...>) {
    return (std::to_string(kFirst) + ... + (", " + std::to_string(kOthers)));
}

// What the kernel takes, of what the CPU takes.
void check_for_kernel(const CachedTokens &a, const Tensor &workspace) {
    const bool whole_tiles = !a.pages.table || a.pages.index.block_places % kTileKeys == 0;
    if (!has(DecodeElements{}, a.element) || a.group > kMaxDecodeGroup || !has(DecodeHeadDims{}, a.head_dim) ||
        !whole_tiles) {
        const std::string pages =
            a.pages.table ? text_of(" and pages of ", a.pages.index.block_places) : std::string();
        refuse(text_of("qkv is ", a.qkv.dtype_name(), " with G=", a.group, " and D=", a.head_dim, pages,
                       ": on a GPU allowed are bfloat16 and float16, G up to ", kMaxDecodeGroup, ", D of ",
                       listed(DecodeHeadDims{}), " and pages of a multiple of ", kTileKeys,
                       ". Call append_rope and attend with PyTorch instead."));
    }
    const auto check_size = [](const char *letter, std::int64_t size, std::int32_t allowed) {
        if (size > allowed) {
            refuse(text_of("qkv has ", letter, "=", size, ": on a GPU allowed are up to ", allowed, "."));
        }
    };
    check_size("B", a.qkv.shape[0], kMaxDecodeRows);
    check_size("K", a.kv_heads, kMaxDecodeKvHeads);
    const auto rows = static_cast<std::int32_t>(a.qkv.shape[0]);
    const std::int32_t capacity = a.pages.index.capacity;
    const std::int64_t needed = decode_attention_workspace(rows, a.kv_heads, a.group, a.head_dim, capacity);
    if (workspace.shape[0] < needed) {
        refuse(text_of("workspace has ", workspace.shape[0], " numbers, but ", needed,
                       " are needed: make one of workspace_size(", rows, ", ", a.kv_heads, ", ", a.group, ", ",
                       a.head_dim, ", ", capacity, ") zeros."));
    }
    check_aligned(workspace);
    for (const Tensor *const cache : {&a.key, &a.value}) {
        if (cache->byte_stride(1) >= std::int64_t{1} << 31) {  // the kernel multiplies it in 32 bits
            refuse(text_of(cache->name, " has a stride of ", cache->byte_stride(1),
                           " bytes between places: allowed are less than 2**31."));
        }
    }
    if (a.key_scale) {
        check_aligned(*a.key_scale);
        check_aligned(*a.value_scale);
    }
}

template <Where kWhere>
std::optional<Call<DecodeAttentionArguments>> decode_arguments(py::handle qkv, py::handle cos_sin, py::handle start,
                                                               py::handle page_table, py::handle scale_number,
                                                               py::handle key_cache, py::handle value_cache,
                                                               py::handle output_tensor, py::handle workspace_tensor,
                                                               py::handle key_scale, py::handle value_scale) {
    const CachedTokens a = cached_tokens("decode_attention", "B", kWhere, qkv, cos_sin, start, page_table, key_cache,
                                         value_cache, key_scale, value_scale);
    const Launch launch = launch_for(kWhere, a.qkv);
    const std::int64_t rows = a.qkv.shape[0];
    const float scale = real({"scale"}, scale_number);
    const Tensor output({"output"}, output_tensor);
    check_like(output, a.qkv, {rows, a.heads(), a.head_dim}, "[B, K * G, D]");
    check_contiguous(output);
    a.check_rows(rows);
    const Tensor workspace({"workspace"}, workspace_tensor);
    check(workspace, DType::kInt32, a.qkv.device, {kAny}, "[at least workspace_size(...)]");
    if constexpr (kWhere != Where::kCpu) {
        check_for_kernel(a, workspace);
    }
    a.check_memory("decode_attention", output);
    for (const Tensor *const tensor : {&a.qkv, &a.cos_sin, &a.start}) {
        check_apart(workspace, *tensor);
    }
    for (const Tensor *const tensor : a.written(output)) {
        check_apart(workspace, *tensor);
    }
    if (a.pages.table) {
        check_apart(workspace, *a.pages.table);
    }
    if (rows == 0) {
        return std::nullopt;
    }
    const DecodeAttentionArguments arguments = {a.element,
                                                a.qkv.data,
                                                a.qkv.byte_stride(0),
                                                static_cast<std::int32_t>(rows),
                                                a.kv_heads,
                                                a.group,
                                                a.head_dim,
                                                a.cos_sin.data,
                                                a.cos_sin.byte_stride(0),
                                                a.positions,
                                                a.start.as<const std::int32_t>(),
                                                a.pages.index,
                                                a.key_memory(),
                                                a.value_memory(),
                                                scale,
                                                output.data,
                                                workspace.as<std::int32_t>(),
                                                a.key_scales(),
                                                a.value_scales()};
    return Call<DecodeAttentionArguments>{arguments, launch, {}};
}

}  // namespace

void bind_attention(py::module_ &module) {
    const auto define_attention = [&](const char *name, auto function) {
        define(module, name, function, "qkv", "cos_sin", "start", "page_table", "scale", "key_cache", "value_cache",
               "output", "workspace", optional("key_scale"), optional("value_scale"));
    };
    define(module, "decode_attention_workspace", &workspace_size, "rows", "kv_heads", "group", "head_dim", "capacity");
    define_attention("decode_attention_append_cpu",
                     on_host(decode_arguments<Where::kCpu>, decode_attention_append_cpu));
    define_attention("decode_attention_check",
                     on_host<DecodeAttentionArguments>(decode_arguments<Where::kChecks>, check_values));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_attention("decode_attention_cuda", on_gpu(decode_arguments<Where::kCuda>, decode_attention_cuda));
#endif
}

}  // namespace llama_te::bindings
