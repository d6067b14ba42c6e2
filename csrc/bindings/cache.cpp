// Operators on caches: append_rope, reorder_rows and reorder_pages.

#include <stdexcept>
#include <vector>

#include "arguments.h"
#include "cache/append_rope.h"
#include "cache/reorder.h"

namespace llama_te::bindings {

namespace {

AppendArguments append_arguments(int element, Address qkv, std::int64_t qkv_token_stride, std::int64_t tokens,
                                 std::int32_t width, std::int32_t kv_heads, std::int32_t group, std::int32_t head_dim,
                                 Address cos_sin, std::int64_t cos_sin_stride, std::int32_t positions, Address cu_new,
                                 Address start, std::int32_t rows, const Table &page_table, std::int32_t capacity,
                                 std::int32_t blocks, std::int32_t block_places, Address query, const Memory &key,
                                 const Memory &value) {
    return {static_cast<ElementType>(element),
            pointer<const char>(qkv),
            qkv_token_stride,
            tokens,
            width,
            kv_heads,
            group,
            head_dim,
            pointer<const char>(cos_sin),
            cos_sin_stride,
            positions,
            pointer<const std::int32_t>(cu_new),
            pointer<const std::int32_t>(start),
            rows,
            index_of(page_table, capacity, blocks, block_places),
            pointer<char>(query),
            memory_of(key),
            memory_of(value)};
}

ReorderArguments reorder_arguments(const std::vector<Address> &caches, std::int32_t rows, Address source_rows,
                                   bool wide, Address lengths, std::int64_t block_bytes, std::int64_t place_bytes,
                                   const Table &page_table, std::int32_t capacity, std::int32_t blocks,
                                   std::int32_t block_places, Address ticket) {
    if (caches.size() > kMaxCaches || rows > kMaxReorderRows) {
        throw std::invalid_argument("more caches or rows than a reorder takes");
    }
    ReorderArguments arguments = {};
    for (const Address cache : caches) {
        arguments.caches[arguments.cache_count++] = pointer<char>(cache);
    }
    arguments.rows = rows;
    arguments.source_rows = {pointer<const void>(source_rows), wide};
    arguments.lengths = pointer<const std::int32_t>(lengths);
    arguments.block_bytes = block_bytes;
    arguments.place_bytes = place_bytes;
    arguments.index = index_of(page_table, capacity, blocks, block_places);
    arguments.semaphore = pointer<std::int32_t>(ticket);
    return arguments;
}

}  // namespace

void bind_cache(py::module_ &module) {
    const auto define_append = [&](const char *name, auto function, auto... first) {
        define(module, name, function, first..., "element", "qkv", "qkv_token_stride", "tokens", "width", "kv_heads",
               "group", "head_dim", "cos_sin", "cos_sin_stride", "positions", "cu_new", "start", "rows", "page_table",
               "capacity", "blocks", "block_places", "query", "key", "value");
    };
    const auto define_reorder = [&](const char *name, auto function, auto... first) {
        define(module, name, function, first..., "caches", "rows", "source_rows", "wide", "lengths", "block_bytes",
               "place_bytes", "page_table", "capacity", "blocks", "block_places", "ticket");
    };
    define_append("append_rope_check", on_host<AppendArguments>(append_arguments, check_values));
    define_append("append_rope_cpu", on_host<AppendArguments>(append_arguments, append_rope_cpu));
    define_reorder("reorder_check", on_host<ReorderArguments>(reorder_arguments, check_values));
    define_reorder("reorder_rows_cpu", on_host(reorder_arguments, reorder_rows_cpu));
    define_reorder("reorder_pages_cpu", on_host(reorder_arguments, reorder_pages_cpu));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_append("append_rope_cuda", on_gpu(append_arguments, append_rope_cuda), "device", "stream");
    define_reorder("reorder_rows_cuda", on_gpu(reorder_arguments, reorder_rows_cuda), "device", "stream");
    define_reorder("reorder_pages_cuda", on_gpu(reorder_arguments, reorder_pages_cuda), "device", "stream");
#endif
}

}  // namespace llama_te::bindings
