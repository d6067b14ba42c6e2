#include "cached_tokens.h"

#include <limits>

#include "cache/append_rope.h"

namespace llama_te::bindings {

namespace {

constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

// The scales of `cache`, which is named so, or none. FP8 caches need them, and no others have them.
std::optional<Tensor> scale_of(const Tensor &cache, const char *name, py::handle scale_tensor) {
    const bool is_fp8 = cache.dtype == DType::kFloat8E4M3;
    if (scale_tensor.is_none()) {
        if (is_fp8) {
            refuse(text_of(name, " is None, but ", cache.name, " is float8_e4m3fn: pass its scales."));
        }
        return std::nullopt;
    }
    const Tensor scale({name}, scale_tensor);
    if (!is_fp8) {
        refuse(text_of(name, " is given, but ", cache.name, " is ", cache.dtype_name(), ", which has no scales: pass ",
                       "None."));
    }
    check(scale, DType::kUInt8, cache.device, {cache.shape[0], cache.shape[2], cache.shape[1]},
          "[pages, K, page size]");
    return scale;
}

}  // namespace

CacheMemory memory_of(const Tensor &cache) {
    return {cache.data, cache.byte_stride(0), cache.byte_stride(1), cache.byte_stride(2)};
}

CacheScales scales_of(const Tensor &scale) {
    return {scale.as<std::uint8_t>(), scale.byte_stride(0), scale.byte_stride(1)};
}

Pages::Pages(const Tensor &cache, py::handle page_table, const py::object &device, const char *table_name)
    : name(cache.name) {
    index.blocks = cache.size(0, "R");
    index.block_places = cache.size(1, "L");
    index.page_table = nullptr;
    index.page_table_stride = 0;
    index.capacity = index.block_places;
    rows = index.blocks;
    if (page_table.is_none()) {
        return;
    }
    table.emplace(Name{table_name}, page_table);
    check(*table, DType::kInt32, device, {kAny, kAny}, "[at least B, pages per row]");
    name = table->name;
    rows = table->shape[0];
    if (index.block_places > 0 && table->shape[1] > kMost / index.block_places) {
        refuse(text_of(name, " has ", table->shape[1], " pages per row of ", index.block_places,
                       " tokens: allowed are less than 2**31 tokens."));
    }
    index.capacity = static_cast<std::int32_t>(table->shape[1] * index.block_places);
    index.page_table = table->as<const std::int32_t>();
    index.page_table_stride = table->byte_stride(0);
}

CachedTokens cached_tokens(const char *operation, const char *tokens, Where where, py::handle qkv_tensor,
                           py::handle cos_sin_tensor, py::handle start_tensor, py::handle page_table,
                           py::handle key_cache, py::handle value_cache, py::handle key_scale_tensor,
                           py::handle value_scale_tensor) {
    const Tensor qkv({"qkv"}, qkv_tensor);
    const ElementType element = element_of(qkv);
    if (qkv.rank != 4 || qkv.shape[1] < 1 || qkv.shape[2] < 3) {
        refuse(text_of(qkv.name, " has the shape ", qkv.shape_text(), "; it must be [", tokens,
                       ", K, G + 2, D] with K and G of at least 1."));
    }
    check_no_gradient(operation, qkv);
    const auto head_dim = qkv.shape[3];
    if (head_dim < 1 || head_dim > kMaxHeadDim || head_dim % kHeadDimMultiple != 0) {
        refuse(text_of(qkv.name, " has heads of size D=", head_dim, ": allowed are multiples of ", kHeadDimMultiple,
                       " up to ", kMaxHeadDim, "."));
    }
    qkv.size(0, tokens);
    const std::int32_t kv_heads = qkv.size(1, "K");
    const std::int32_t heads_of_group = qkv.size(2, "G + 2");
    if (std::int64_t{kv_heads} * heads_of_group > kMost / static_cast<std::int32_t>(kMaxHeadDim * sizeof(float))) {
        refuse(text_of(qkv.name, " has the shape ", qkv.shape_text(), ": a token must have less than 2**31 bytes."));
    }
    const py::object &values = device_of_values(where, qkv);
    const Tensor cos_sin({"cos_sin"}, cos_sin_tensor);
    check(cos_sin, DType::kFloat32, qkv.device, {kAny, head_dim}, "[P, D]");
    const Tensor start({"start"}, start_tensor);
    check(start, DType::kInt32, values, {kAny}, "[at least B]");
    const Tensor key({"key_cache"}, key_cache);
    const bool is_fp8 = key.dtype == DType::kFloat8E4M3 && element == ElementType::kBFloat16;
    const DType dtype = is_fp8 ? key.dtype : qkv.dtype;
    check(key, dtype, qkv.device, {kAny, kAny, kv_heads, head_dim}, "[R, L, K, D]");
    const Tensor value({"value_cache"}, value_cache);
    check(value, dtype, qkv.device, {key.shape[0], key.shape[1], kv_heads, head_dim}, "the shape of key_cache");
    if (is_fp8 && page_table.is_none()) {
        refuse("page_table is None, but key_cache is float8_e4m3fn: only paged caches can be FP8.");
    }
    return {qkv,
            cos_sin,
            start,
            key,
            value,
            scale_of(key, "key_scale", key_scale_tensor),
            scale_of(value, "value_scale", value_scale_tensor),
            Pages(key, page_table, values),
            element,
            kv_heads,
            heads_of_group - 2,
            static_cast<std::int32_t>(head_dim),
            cos_sin.size(0, "P")};
}

void CachedTokens::check_rows(std::int64_t wanted) const {
    const auto check_room = [&](const Name &name, std::int64_t room) {
        if (room < wanted) {
            refuse(text_of(name, " has ", room, " rows, but there are B=", wanted, " rows of new tokens."));
        }
    };
    check_room(start.name, start.shape[0]);
    check_room(pages.name, pages.rows);
}

std::vector<const Tensor *> CachedTokens::written(const Tensor &output) const {
    std::vector<const Tensor *> tensors = {&output, &key, &value};
    if (key_scale) {
        tensors.insert(tensors.end(), {&*key_scale, &*value_scale});
    }
    return tensors;
}

void CachedTokens::check_memory(const char *operation, const Tensor &output) const {
    if (!qkv.contiguous(1)) {
        refuse(text_of(qkv.name, " has the strides ", qkv.strides_text(),
                       ": all but the first dimension must be contiguous."));
    }
    for (const Tensor *const tensor : {&qkv, &cos_sin, &output, &key, &value}) {
        check_aligned(*tensor);
    }
    for (const Tensor *const tensor : written(output)) {
        check_apart(qkv, *tensor);
        check_apart(cos_sin, *tensor);
        check_apart(start, *tensor);
        if (pages.table) {
            check_apart(*pages.table, *tensor);
        }
        check_written(operation, *tensor);
    }
    check_apart(output, key);
    check_apart(output, value);
    // Keys and values may lie interleaved in one tensor, as long as one does not start on the other.
    if (key.contiguous() || key.data == value.data) {
        check_apart(key, value);
    }
    if (key_scale) {
        for (const Tensor *const tensor : {&output, &key, &value}) {
            check_apart(*tensor, *key_scale);
            check_apart(*tensor, *value_scale);
        }
        check_apart(*key_scale, *value_scale);
    }
}

CacheMemory CachedTokens::key_memory() const {
    return memory_of(key);
}

CacheMemory CachedTokens::value_memory() const {
    return memory_of(value);
}

CacheScales CachedTokens::key_scales() const {
    return key_scale ? scales_of(*key_scale) : CacheScales{};
}

CacheScales CachedTokens::value_scales() const {
    return value_scale ? scales_of(*value_scale) : CacheScales{};
}

}  // namespace llama_te::bindings
