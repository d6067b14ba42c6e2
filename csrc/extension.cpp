// The Python module `llama_te_infer._extension`: what it was built with, and the operators' kernels.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "decode_attention.h"
#include "kernels.h"
#include "linear.h"
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
#include "probe.h"
#endif

namespace py = pybind11;

void bind_attention(py::module_ &module);  // attention_bindings.cpp
void bind_decode(py::module_ &module);     // decode_bindings.cpp

namespace {

// MSVC keeps __cplusplus at 199711 and tells the standard here instead.
#ifdef _MSVC_LANG
constexpr long kCxxStandard = _MSVC_LANG;
#else
constexpr long kCxxStandard = __cplusplus;
#endif

py::dict build_info() {
    py::dict info;
    info["compiler"] = LLAMA_TE_COMPILER;
    info["cxx_standard"] = kCxxStandard / 100 % 100;
    info["build_type"] = LLAMA_TE_BUILD_TYPE;
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    info["cuda"] = llama_te::cuda_version();
    info["cuda_architectures"] = py::str(LLAMA_TE_CUDA_ARCHITECTURES).attr("split")(",");
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::list();
#endif
    return info;
}

py::object cuda_problem() {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    const std::string problem = llama_te::cuda_problem();
    return problem.empty() ? py::object(py::none()) : py::object(py::str(problem));
#else
    return py::str("built without CUDA");
#endif
}

// Sizes and types that the kernels take. A build without CUDA has the same.
py::dict limits() {
    using llama_te::ElementType;
    using llama_te::WeightType;
    py::dict elements;
    elements["bfloat16"] = static_cast<int>(ElementType::kBFloat16);
    elements["float16"] = static_cast<int>(ElementType::kFloat16);
    elements["float32"] = static_cast<int>(ElementType::kFloat32);
    py::dict weights;
    weights["bfloat16"] = static_cast<int>(WeightType::kBFloat16);
    weights["float8_e4m3fn"] = static_cast<int>(WeightType::kFloat8E4M3);
    py::list head_dims;
    for (const int head_dim : llama_te::kDecodeHeadDims) {
        head_dims.append(head_dim);
    }
    py::dict limits;
    limits["vector_bytes"] = llama_te::kVectorBytes;
    limits["element_types"] = elements;
    limits["weight_types"] = weights;
    limits["head_dim_multiple"] = llama_te::kHeadDimMultiple;
    limits["max_head_dim"] = llama_te::kMaxHeadDim;
    limits["max_reorder_rows"] = llama_te::kMaxReorderRows;
    limits["max_reorder_caches"] = llama_te::kMaxCaches;
    limits["decode_element_types"] = py::make_tuple("bfloat16", "float16");
    limits["decode_head_dims"] = head_dims;
    limits["decode_tile_keys"] = llama_te::kTileKeys;
    limits["max_decode_rows"] = llama_te::kMaxDecodeRows;
    limits["max_decode_group"] = llama_te::kMaxGroup;
    limits["max_decode_kv_heads"] = llama_te::kMaxKvHeads;
    limits["max_linear_rows"] = llama_te::kMaxLinearRows;
    limits["max_linear_products"] = llama_te::kMaxProducts;
    limits["linear_row_bytes_multiple"] = llama_te::kLinearRowBytes;
    limits["linear_out_features_multiple"] = llama_te::kLinearOutFeatures;
    return limits;
}

using llama_te::AppendArguments;
using llama_te::ReorderArguments;
using Address = std::uintptr_t;
// A cache: its address and the strides of blocks, places and heads.
using Memory = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
// A page table: its address, 0 for none, and its stride.
using Table = std::tuple<Address, std::int64_t>;

llama_te::CacheMemory memory_of(const Memory &memory) {
    return {reinterpret_cast<char *>(std::get<0>(memory)), std::get<1>(memory), std::get<2>(memory),
            std::get<3>(memory)};
}

llama_te::CacheIndex index_of(const Table &page_table, std::int32_t capacity, std::int32_t blocks,
                              std::int32_t block_places) {
    return {reinterpret_cast<const std::int32_t *>(std::get<0>(page_table)), std::get<1>(page_table), capacity, blocks,
            block_places};
}

AppendArguments append_arguments(int element, Address qkv, std::int64_t qkv_token_stride, std::int64_t tokens,
                                 std::int32_t width, std::int32_t kv_heads, std::int32_t group, std::int32_t head_dim,
                                 Address cos_sin, std::int64_t cos_sin_stride, std::int32_t positions, Address cu_new,
                                 Address start, std::int32_t rows, const Table &page_table, std::int32_t capacity,
                                 std::int32_t blocks, std::int32_t block_places, Address query, const Memory &key,
                                 const Memory &value) {
    return {static_cast<llama_te::ElementType>(element),
            reinterpret_cast<const char *>(qkv),
            qkv_token_stride,
            tokens,
            width,
            kv_heads,
            group,
            head_dim,
            reinterpret_cast<const char *>(cos_sin),
            cos_sin_stride,
            positions,
            reinterpret_cast<const std::int32_t *>(cu_new),
            reinterpret_cast<const std::int32_t *>(start),
            rows,
            index_of(page_table, capacity, blocks, block_places),
            reinterpret_cast<char *>(query),
            memory_of(key),
            memory_of(value)};
}

ReorderArguments reorder_arguments(const std::vector<Address> &caches, std::int32_t rows, Address source_rows,
                                   bool wide, Address lengths, std::int64_t block_bytes, std::int64_t place_bytes,
                                   const Table &page_table, std::int32_t capacity, std::int32_t blocks,
                                   std::int32_t block_places, Address ticket) {
    if (caches.size() > llama_te::kMaxCaches || rows > llama_te::kMaxReorderRows) {
        throw std::invalid_argument("more caches or rows than a reorder takes");
    }
    ReorderArguments arguments = {};
    for (const Address cache : caches) {
        arguments.caches[arguments.cache_count++] = reinterpret_cast<char *>(cache);
    }
    arguments.rows = rows;
    arguments.source_rows = {reinterpret_cast<const void *>(source_rows), wide};
    arguments.lengths = reinterpret_cast<const std::int32_t *>(lengths);
    arguments.block_bytes = block_bytes;
    arguments.place_bytes = place_bytes;
    arguments.index = index_of(page_table, capacity, blocks, block_places);
    arguments.ticket = reinterpret_cast<std::int32_t *>(ticket);
    return arguments;
}

// An operator's functions for the CPU, for a check of its arrays' values and, with two more arguments, for CUDA.
template <typename Arguments, typename... Parameters>
auto on_host(Arguments (*make)(Parameters...), void (*run)(const Arguments &)) {
    return [make, run](Parameters... parameters) {
        const Arguments arguments = make(parameters...);
        const py::gil_scoped_release released;  // the CPU's loops can take a while
        run(arguments);
    };
}

template <typename Arguments, typename... Parameters>
auto on_gpu(Arguments (*make)(Parameters...), void (*run)(const Arguments &, int, Address)) {
    return [make, run](int device, Address stream, Parameters... parameters) {
        run(make(parameters...), device, stream);
    };
}

}  // namespace

PYBIND11_MODULE(_extension, module) {
    module.doc() = "Compiled part of llama_te_infer.";
    module.def("build_info", &build_info, "What this extension was compiled with.");
    module.def("cuda_problem", &cuda_problem,
               "Run an empty kernel on the current GPU: None where that works, else why it does not.");

    module.def("limits", &limits, "Sizes and types that the kernels take.");
    bind_attention(module);
    bind_decode(module);

    const auto define = [&module](const char *name, auto function, auto... names) {
        module.def(name, function, py::arg(names)...);
    };
    // Strides are in bytes; `page_table` is (address, stride), with address 0 for contiguous caches; `key` and `value`
    // are (address, strides of blocks, places and heads).
    const auto define_append = [&](const char *name, auto function, auto... first) {
        define(name, function, first..., "element", "qkv", "qkv_token_stride", "tokens", "width", "kv_heads", "group",
               "head_dim", "cos_sin", "cos_sin_stride", "positions", "cu_new", "start", "rows", "page_table",
               "capacity", "blocks", "block_places", "query", "key", "value");
    };
    const auto define_reorder = [&](const char *name, auto function, auto... first) {
        define(name, function, first..., "caches", "rows", "source_rows", "wide", "lengths", "block_bytes",
               "place_bytes", "page_table", "capacity", "blocks", "block_places", "ticket");
    };
    define_append("append_rope_check", on_host<AppendArguments>(append_arguments, llama_te::check_values));
    define_append("append_rope_cpu", on_host<AppendArguments>(append_arguments, llama_te::append_rope_cpu));
    define_reorder("reorder_check", on_host<ReorderArguments>(reorder_arguments, llama_te::check_values));
    define_reorder("reorder_rows_cpu", on_host(reorder_arguments, llama_te::reorder_rows_cpu));
    define_reorder("reorder_pages_cpu", on_host(reorder_arguments, llama_te::reorder_pages_cpu));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_append("append_rope_cuda", on_gpu(append_arguments, llama_te::append_rope_cuda), "device", "stream");
    define_reorder("reorder_rows_cuda", on_gpu(reorder_arguments, llama_te::reorder_rows_cuda), "device", "stream");
    define_reorder("reorder_pages_cuda", on_gpu(reorder_arguments, llama_te::reorder_pages_cuda), "device", "stream");
#endif
}
