// Operators on caches: append_rope, widen_pages, reorder_rows and reorder_pages.

#include <algorithm>
#include <vector>

#include "cache/append_rope.h"
#include "cache/reorder.h"
#include "cache/widen_pages.h"
#include "cached_tokens.h"

namespace llama_te::bindings {

namespace {

template <Where kWhere>
std::optional<Call<AppendArguments>> append_arguments(py::handle qkv, py::handle cos_sin, py::handle cu_new_tensor,
                                                      py::handle start, py::handle page_table, py::handle width_number,
                                                      py::handle query_tensor, py::handle key_cache,
                                                      py::handle value_cache, py::handle key_scale,
                                                      py::handle value_scale) {
    const CachedTokens a = cached_tokens("append_rope", "N", kWhere, qkv, cos_sin, start, page_table, key_cache,
                                         value_cache, key_scale, value_scale);
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
    for (const Tensor *const written : a.written(query)) {
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
                                       a.value_memory(),
                                       a.key_scales(),
                                       a.value_scales()};
    return Call<AppendArguments>{arguments, launch, {}};
}

template <Where kWhere>
std::optional<Call<WidenPagesArguments>> widen_arguments(py::handle source_tensor, py::handle scale_tensor,
                                                         py::handle page_table, py::handle length_tensor,
                                                         py::handle target_tensor) {
    const Tensor source({"source"}, source_tensor);
    const Launch launch = launch_for(kWhere, source);
    const py::object &values = device_of_values(kWhere, source);
    check(source, DType::kFloat8E4M3, source.device, {kAny, kAny, kAny, kAny}, "[pages, page size, K, D]");
    const std::int64_t head_dim = source.shape[3];
    if (head_dim < 1 || head_dim > kMaxHeadDim || head_dim % kHeadDimMultiple != 0) {
        refuse(text_of(source.name, " has heads of size D=", head_dim, ": allowed are multiples of ", kHeadDimMultiple,
                       " up to ", kMaxHeadDim, "."));
    }
    const Tensor scale({"scale"}, scale_tensor);
    check(scale, DType::kUInt8, source.device, {source.shape[0], source.shape[2], source.shape[1]},
          "[pages, K, page size]");
    const Tensor length({"length_B"}, length_tensor);
    check(length, DType::kInt32, values, {kAny}, "[B]");
    const std::int32_t rows = length.size(0, "B");
    const Tensor table({"page_table_BP"}, page_table);  // None, which contiguous caches have, is refused
    const Pages pages(source, page_table, values, "page_table_BP");
    if (pages.rows < rows) {
        refuse(text_of(length.name, " has B=", rows, " rows, but ", table.name, " has ", pages.rows, "."));
    }
    const Tensor target({"target"}, target_tensor);
    check(target, DType::kBFloat16, source.device, {kAny, source.shape[1], source.shape[2], head_dim},
          "[at least B * P, page size, K, D]");
    check_contiguous(target);
    const std::int32_t pages_per_row = table.size(1, "P");
    const std::int64_t needed = std::int64_t{rows} * pages_per_row;
    if (target.shape[0] < needed) {
        refuse(text_of(target.name, " has ", target.shape[0], " pages, but B=", rows, " rows of ", pages_per_row,
                       " need ", needed, "."));
    }
    check_aligned(source);
    check_aligned(target);
    check_written("widen_pages", target);
    for (const Tensor *const tensor : {&source, &scale, &length, &table}) {
        check_apart(*tensor, target);
    }
    if (needed == 0 || source.empty()) {
        return std::nullopt;
    }
    const WidenPagesArguments arguments = {memory_of(source),
                                           scales_of(scale),
                                           pages.index,
                                           rows,
                                           pages_per_row,
                                           source.size(2, "K"),
                                           static_cast<std::int32_t>(head_dim),
                                           length.as<const std::int32_t>(),
                                           target.data};
    return Call<WidenPagesArguments>{arguments, launch, {}};
}

// The caches of a reorder. The scales of FP8 caches, if there are any, lie among them in the list.
struct Caches {
    py::tuple held;
    std::vector<Tensor> tensors;
    std::vector<Tensor> scales;
    std::int64_t place_bytes = 1;
    std::int64_t scale_bytes = 0;  // of a page

    std::vector<const Tensor *> all() const {
        std::vector<const Tensor *> pointers;
        pointers.reserve(tensors.size() + scales.size());
        for (const std::vector<Tensor> *const list : {&tensors, &scales}) {
            for (const Tensor &tensor : *list) {
                pointers.push_back(&tensor);
            }
        }
        return pointers;
    }
};

bool are_alike(const Tensor &one, const Tensor &other) {
    return one.rank == other.rank && std::equal(one.shape, one.shape + one.rank, other.shape) &&
           one.dtype == other.dtype && one.dtype_name() == other.dtype_name() && one.device.equal(other.device);
}

bool is_scale_of(const Tensor &scale, const Tensor &cache) {
    return cache.dtype == DType::kFloat8E4M3 && cache.rank == 4 && scale.dtype == DType::kUInt8 && scale.rank == 3 &&
           scale.shape[0] == cache.shape[0] && scale.shape[1] == cache.shape[2] && scale.shape[2] == cache.shape[1] &&
           scale.device.equal(cache.device);
}

Caches caches_of(py::handle list, bool are_pages) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
        throw py::type_error(text_of("caches is a ", Py_TYPE(list.ptr())->tp_name,
                                     ": it must be a list or a tuple of tensors."));
    }
    Caches caches;
    caches.held = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
    const std::size_t count = caches.held.size();
    if (count < 1 || count > kMaxCaches) {
        refuse(text_of("caches has ", count, " tensors: allowed are 1 to ", kMaxCaches, "."));
    }
    caches.tensors.reserve(count);
    caches.scales.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
        const Tensor cache(Name{"", "caches", static_cast<int>(i)}, caches.held[i]);
        const Tensor &first = i == 0 ? cache : caches.tensors.front();
        const bool is_scale = are_pages && i > 0 && is_scale_of(cache, first);
        if (i == 0) {
            if (first.rank < 3 || first.empty()) {
                refuse(text_of(first.name, " has the shape ", first.shape_text(),
                               "; it must be [R, L, K, D] or [pages, page size, K, D]."));
            }
        } else if (!is_scale && !are_alike(cache, first)) {
            const auto described = [](const Tensor &tensor) {
                return text_of(tensor.dtype_name(), " ", tensor.shape_text(), " on ",
                               py::str(tensor.device).cast<std::string>());
            };
            refuse(text_of(cache.name, " is ", described(cache), ", but ", first.name, " is ", described(first),
                           ": all must be alike, but for the scales of FP8 caches."));
        }
        check_contiguous(cache);
        check_no_gradient("a reorder", cache);
        (is_scale ? caches.scales : caches.tensors).push_back(cache);
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
    if (!caches.scales.empty()) {
        caches.scale_bytes = caches.scales.front().shape[1] * caches.scales.front().shape[2];
    }
    std::vector<const Tensor *> order = caches.all();
    for (const Tensor *const cache : order) {
        check_aligned(*cache);
    }
    std::sort(order.begin(), order.end(),
              [](const Tensor *one, const Tensor *other) { return std::less<>()(one->data, other->data); });
    for (std::size_t i = 1; i < count; ++i) {
        const bool in_order = order[i - 1]->name.item < order[i]->name.item;
        check_apart(*order[in_order ? i - 1 : i], *order[in_order ? i : i - 1]);
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
    for (const Tensor *const cache : caches.all()) {
        check_apart(source_rows, *cache);
        check_apart(lengths, *cache);
        if (pages.table) {
            check_apart(*pages.table, *cache);
        }
        arguments.caches[arguments.cache_count++] = cache->data;
    }
    arguments.scale_count = static_cast<std::int32_t>(caches.scales.size());
    arguments.cache_count -= arguments.scale_count;
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
    arguments.scale_bytes = caches.scale_bytes;
    arguments.index = pages.index;
    return {arguments, launch, caches.held};
}

template <Where kWhere>
std::optional<Call<ReorderArguments>> rows_arguments(py::handle list, py::handle source_rows, py::handle lengths) {
    const Caches caches = caches_of(list, false);
    const auto call = reorder_arguments<kWhere>(caches, py::none(), source_rows, lengths);
    return call.arguments.rows == 0 ? std::nullopt : std::optional(call);
}

template <Where kWhere>
std::optional<Call<ReorderArguments>> pages_arguments(py::handle list, py::handle page_table, py::handle source_rows,
                                                      py::handle lengths, py::handle page_size,
                                                      py::handle ticket_tensor) {
    const Caches caches = caches_of(list, true);
    const Tensor &first = caches.tensors.front();
    const Tensor table({"page_table"}, page_table);  // None, which contiguous caches have, is refused
    auto call = reorder_arguments<kWhere>(caches, page_table, source_rows, lengths);
    const Tensor ticket({"ticket"}, ticket_tensor);
    check(ticket, DType::kInt32, first.device, {1}, "[1]");
    if (integer({"page_size"}, page_size, INT64_MIN, INT64_MAX) != first.shape[1]) {
        refuse(text_of("page_size=", page_size.cast<std::int64_t>(), ", but the pages of ", first.name, ", ",
                       first.shape_text(), ", have ", first.shape[1], "."));
    }
    for (const Tensor *const cache : caches.all()) {
        check_apart(ticket, *cache);
    }
    check_apart(ticket, table);
    call.arguments.semaphore = ticket.as<std::int32_t>();
    return call.arguments.rows == 0 ? std::nullopt : std::optional(call);
}

}  // namespace

void bind_cache(py::module_ &module) {
    const auto define_append = [&](const char *name, auto function) {
        define(module, name, function, "qkv", "cos_sin", "cu_new", "start", "page_table", "width", "query", "key_cache",
               "value_cache", optional("key_scale"), optional("value_scale"));
    };
    const auto define_widen = [&](const char *name, auto function) {
        define(module, name, function, "source", "scale", "page_table_BP", "length_B", "target");
    };
    const auto define_rows = [&](const char *name, auto function) {
        define(module, name, function, "caches", "source_rows", "lengths");
    };
    const auto define_pages = [&](const char *name, auto function) {
        define(module, name, function, "caches", "page_table", "source_rows", "lengths", "page_size", "ticket");
    };
    define_append("append_rope_cpu", on_host(append_arguments<Where::kCpu>, append_rope_cpu));
    define_append("append_rope_check", on_host<AppendArguments>(append_arguments<Where::kChecks>, check_values));
    define_widen("widen_pages_cpu", on_host(widen_arguments<Where::kCpu>, widen_pages_cpu));
    define_widen("widen_pages_check", on_host<WidenPagesArguments>(widen_arguments<Where::kChecks>, check_values));
    define_rows("reorder_rows_cpu", on_host(rows_arguments<Where::kCpu>, reorder_rows_cpu));
    define_rows("reorder_rows_check", on_host<ReorderArguments>(rows_arguments<Where::kChecks>, check_values));
    define_pages("reorder_pages_cpu", on_host(pages_arguments<Where::kCpu>, reorder_pages_cpu));
    define_pages("reorder_pages_check", on_host<ReorderArguments>(pages_arguments<Where::kChecks>, check_values));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_append("append_rope_cuda", on_gpu(append_arguments<Where::kCuda>, append_rope_cuda));
    define_widen("widen_pages_cuda", on_gpu(widen_arguments<Where::kCuda>, widen_pages_cuda));
    define_rows("reorder_rows_cuda", on_gpu(rows_arguments<Where::kCuda>, reorder_rows_cuda));
    define_pages("reorder_pages_cuda", on_gpu(pages_arguments<Where::kCuda>, reorder_pages_cuda));
#endif
}

}  // namespace llama_te::bindings
