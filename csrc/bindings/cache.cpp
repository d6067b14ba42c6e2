// Operators on caches: append_rope, reorder_rows and reorder_pages.

#include <algorithm>
#include <vector>

#include "cache/append_rope.h"
#include "cache/reorder.h"
#include "cached_tokens.h"

namespace llama_te::bindings {

namespace {

template <Where kWhere>
std::optional<Call<AppendArguments>> append_arguments(py::handle qkv, py::handle cos_sin, py::handle cu_new_tensor,
                                                      py::handle start, py::handle page_table, py::handle width_number,
                                                      py::handle query_tensor, py::handle key_cache,
                                                      py::handle value_cache) {
    const CachedTokens a =
        cached_tokens("append_rope", "N", kWhere, qkv, cos_sin, start, page_table, key_cache, value_cache);
    const Launch launch = launch_for(kWhere, a.qkv);
    const std::int64_t tokens = a.qkv.shape[0];
    const Tensor cu_new({"cu_new"}, cu_new_tensor);
    check(cu_new, DType::kInt32, device_of_values(kWhere, a.qkv), {kAny}, "[B + 1]");
    const Tensor query({"query"}, query_tensor);
    check_like(query, a.qkv, {tokens, a.heads(), a.head_dim}, "[N, K * G, D]");
    check_contiguous(query);
    const std::int64_t width = integer({"width"}, width_number, INT64_MIN, INT64_MAX);
    if (width < 0 || (width > 0 && tokens % width != 0)) {
        refuse(text_of("width=", width, " does not fit the N=", tokens, " tokens of qkv: give 0 for packed tokens, or the ",
                       "columns of a padded batch, which divide N."));
    }
    if (cu_new.empty()) {
        refuse("cu_new is empty: it must be [B + 1], beginning with 0.");
    }
    std::int64_t rows = cu_new.size(0, "B + 1") - 1;
    if (width > 0) {
        if (tokens / width > rows) {
            refuse(text_of("width=", width, " makes ", tokens / width, " rows of the N=", tokens,
                           " tokens of qkv, but cu_new has ", rows, "."));
        }
        rows = tokens / width;
    }
    a.check_rows(rows);
    if (tokens == 0) {
        return std::nullopt;
    }
    a.check_memory("append_rope", query);
    for (const Tensor *const written : {&query, &a.key, &a.value}) {
        check_apart(cu_new, *written);
    }
    const AppendArguments arguments = {a.element,
                                       a.qkv.data,
                                       a.qkv.byte_stride(0),
                                       tokens,
                                       static_cast<std::int32_t>(width),
                                       a.kv_heads,
                                       a.group,
                                       a.head_dim,
                                       a.cos_sin.data,
                                       a.cos_sin.byte_stride(0),
                                       a.positions,
                                       cu_new.as<const std::int32_t>(),
                                       a.start.as<const std::int32_t>(),
                                       static_cast<std::int32_t>(rows),
                                       a.pages.index,
                                       query.data,
                                       a.key_memory(),
                                       a.value_memory()};
    return Call<AppendArguments>{arguments, launch, {}};
}

// The caches of a reorder.
struct Caches {
    py::tuple held;
    std::vector<Tensor> tensors;
    std::int64_t place_bytes = 1;
};

Caches caches_of(py::handle list) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
        throw py::type_error(text_of("caches is a ", Py_TYPE(list.ptr())->tp_name,
                                     ": it must be a list or a tuple of tensors."));
    }
    Caches caches = {py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr())), {}};
    const std::size_t count = caches.held.size();
    if (count < 1 || count > kMaxCaches) {
        refuse(text_of("caches has ", count, " tensors: allowed are 1 to ", kMaxCaches, "."));
    }
    caches.tensors.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        const Tensor &cache = caches.tensors.emplace_back(Name{"", "caches", static_cast<int>(i)}, caches.held[i]);
        const Tensor &first = caches.tensors.front();
        if (i == 0) {
            if (first.rank < 3 || first.empty()) {
                refuse(text_of(first.name, " has the shape ", first.shape_text(),
                               "; it must be [R, L, K, D] or [pages, page size, K, D]."));
            }
        } else if (cache.rank != first.rank || !std::equal(first.shape, first.shape + first.rank, cache.shape) ||
                   cache.dtype != first.dtype || cache.dtype_name() != first.dtype_name() ||
                   !cache.device.equal(first.device)) {
            const auto described = [](const Tensor &tensor) {
                return text_of(tensor.dtype_name(), " ", tensor.shape_text(), " on ",
                               py::str(tensor.device).cast<std::string>());
            };
            refuse(text_of(cache.name, " is ", described(cache), ", but ", first.name, " is ", described(first),
                           ": all must be alike."));
        }
        check_contiguous(cache);
        check_no_gradient("a reorder", cache);
    }
    const Tensor &first = caches.tensors.front();
    for (int i = 2; i < first.rank; ++i) {
        caches.place_bytes *= first.shape[i];
    }
    caches.place_bytes *= first.itemsize;
    if (caches.place_bytes % kVectorBytes != 0) {
        refuse(text_of(first.name, " has ", caches.place_bytes, " bytes per token: allowed are multiples of ",
                       kVectorBytes, "."));
    }
    std::vector<const Tensor *> order;
    order.reserve(count);
    for (const Tensor &cache : caches.tensors) {
        check_aligned(cache);
        order.push_back(&cache);
    }
    std::sort(order.begin(), order.end(),
              [](const Tensor *one, const Tensor *other) { return std::less<>()(one->data, other->data); });
    for (std::size_t i = 1; i < count; ++i) {
        check_apart(*std::min(order[i - 1], order[i]), *std::max(order[i - 1], order[i]));
    }
    return caches;
}

template <Where kWhere>
Call<ReorderArguments> reorder_arguments(const Caches &caches, py::handle page_table, py::handle source_rows_tensor,
                                         py::handle lengths_tensor) {
    const Tensor &first = caches.tensors.front();
    const Launch launch = launch_for(kWhere, first);
    const py::object &values = device_of_values(kWhere, first);
    const Tensor source_rows({"source_rows"}, source_rows_tensor);
    if (source_rows.dtype != DType::kInt32 && source_rows.dtype != DType::kInt64) {
        refuse(text_of("source_rows is ", source_rows.dtype_name(), ": allowed are int32 and int64."));
    }
    check(source_rows, source_rows.dtype, values, {kAny}, "[B]");
    const std::int64_t rows = source_rows.shape[0];
    const Tensor lengths({"lengths"}, lengths_tensor);
    check(lengths, DType::kInt32, values, {rows}, "[B]");
    if (rows > kMaxReorderRows) {
        refuse(text_of("source_rows has B=", rows, " rows: allowed are up to ", kMaxReorderRows, "."));
    }
    const Pages pages(first, page_table, values);
    if (pages.rows < rows) {
        refuse(text_of("source_rows has B=", rows, " rows, but ", pages.name, " has ", pages.rows, "."));
    }
    ReorderArguments arguments = {};
    for (const Tensor &cache : caches.tensors) {
        check_apart(source_rows, cache);
        check_apart(lengths, cache);
        if (pages.table) {
            check_apart(*pages.table, cache);
        }
        arguments.caches[arguments.cache_count++] = cache.data;
    }
    if (pages.table) {
        check_apart(source_rows, *pages.table);
        check_apart(lengths, *pages.table);
        check_written("reorder_pages", *pages.table);
    }
    arguments.rows = static_cast<std::int32_t>(rows);
    arguments.source_rows = {source_rows.data, source_rows.dtype == DType::kInt64};
    arguments.lengths = lengths.as<const std::int32_t>();
    arguments.block_bytes = first.shape[1] * caches.place_bytes;
    arguments.place_bytes = caches.place_bytes;
    arguments.index = pages.index;
    return {arguments, launch, caches.held};
}

template <Where kWhere>
std::optional<Call<ReorderArguments>> rows_arguments(py::handle list, py::handle source_rows, py::handle lengths) {
    const Caches caches = caches_of(list);
    const auto call = reorder_arguments<kWhere>(caches, py::none(), source_rows, lengths);
    return call.arguments.rows == 0 ? std::nullopt : std::optional(call);
}

template <Where kWhere>
std::optional<Call<ReorderArguments>> pages_arguments(py::handle list, py::handle page_table, py::handle source_rows,
                                                      py::handle lengths, py::handle page_size,
                                                      py::handle ticket_tensor) {
    const Caches caches = caches_of(list);
    const Tensor &first = caches.tensors.front();
    const Tensor table({"page_table"}, page_table);  // None, which contiguous caches have, is refused
    auto call = reorder_arguments<kWhere>(caches, page_table, source_rows, lengths);
    const Tensor ticket({"ticket"}, ticket_tensor);
    check(ticket, DType::kInt32, first.device, {1}, "[1]");
    if (integer({"page_size"}, page_size, INT64_MIN, INT64_MAX) != first.shape[1]) {
        refuse(text_of("page_size=", page_size.cast<std::int64_t>(), ", but the pages of ", first.name, ", ",
                       first.shape_text(), ", have ", first.shape[1], "."));
    }
    for (const Tensor &cache : caches.tensors) {
        check_apart(ticket, cache);
    }
    check_apart(ticket, table);
    call.arguments.semaphore = ticket.as<std::int32_t>();
    return call.arguments.rows == 0 ? std::nullopt : std::optional(call);
}

}  // namespace

void bind_cache(py::module_ &module) {
    const auto define_append = [&](const char *name, auto function) {
        define(module, name, function, "qkv", "cos_sin", "cu_new", "start", "page_table", "width", "query", "key_cache",
               "value_cache");
    };
    const auto define_rows = [&](const char *name, auto function) {
        define(module, name, function, "caches", "source_rows", "lengths");
    };
    const auto define_pages = [&](const char *name, auto function) {
        define(module, name, function, "caches", "page_table", "source_rows", "lengths", "page_size", "ticket");
    };
    define_append("append_rope_cpu", on_host(append_arguments<Where::kCpu>, append_rope_cpu));
    define_append("append_rope_check", on_host<AppendArguments>(append_arguments<Where::kChecks>, check_values));
    define_rows("reorder_rows_cpu", on_host(rows_arguments<Where::kCpu>, reorder_rows_cpu));
    define_rows("reorder_rows_check", on_host<ReorderArguments>(rows_arguments<Where::kChecks>, check_values));
    define_pages("reorder_pages_cpu", on_host(pages_arguments<Where::kCpu>, reorder_pages_cpu));
    define_pages("reorder_pages_check", on_host<ReorderArguments>(pages_arguments<Where::kChecks>, check_values));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_append("append_rope_cuda", on_gpu(append_arguments<Where::kCuda>, append_rope_cuda));
    define_rows("reorder_rows_cuda", on_gpu(rows_arguments<Where::kCuda>, reorder_rows_cuda));
    define_pages("reorder_pages_cuda", on_gpu(pages_arguments<Where::kCuda>, reorder_pages_cuda));
#endif
}

}  // namespace llama_te::bindings
