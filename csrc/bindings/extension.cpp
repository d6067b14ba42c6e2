// The Python module `llama_te_infer._extension`: how it was built, the kernels' limits, and the operators.

#include "arguments.h"
#include "attention/decode_attention.h"
#include "cache/append_rope.h"
#include "cache/reorder.h"
#include "gemv/linear.h"
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
#include "probe.h"
#endif

namespace llama_te::bindings {

namespace {

// MSVC leaves __cplusplus at 199711 and defines the standard here instead.
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
    info["cuda"] = cuda_version();
    info["cuda_architectures"] = py::str(LLAMA_TE_CUDA_ARCHITECTURES).attr("split")(",");
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::list();
#endif
    return info;
}

py::object problem_of_cuda() {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    const std::string problem = cuda_problem();
    return problem.empty() ? py::object(py::none()) : py::object(py::str(problem));
#else
    return py::str("built without CUDA");
#endif
}

// --- limits

// The name of a dtype in torch.
const char *name_of(ElementType element) {
    return element == ElementType::kBFloat16 ? "bfloat16" : element == ElementType::kFloat16 ? "float16" : "float32";
}

const char *name_of(WeightType weight) {
    return weight == WeightType::kBFloat16 ? "bfloat16" : "float8_e4m3fn";
}

template <auto... kTypes>
py::tuple names_of(Values<kTypes...>) {
    return py::make_tuple(name_of(kTypes)...);
}

template <auto... kValues>
py::tuple tuple_of(Values<kValues...>) {
    return py::make_tuple(kValues...);
}

// See `Limits` in ops/library.py.
py::dict limits() {
    py::dict limits;
    limits["vector_bytes"] = kVectorBytes;
    limits["element_types"] = names_of(Elements{});
    limits["weight_types"] = names_of(WeightTypes{});
    limits["head_dim_multiple"] = kHeadDimMultiple;
    limits["max_head_dim"] = kMaxHeadDim;
    limits["max_reorder_rows"] = kMaxReorderRows;
    limits["max_reorder_caches"] = kMaxCaches;
    limits["decode_element_types"] = names_of(DecodeElements{});
    limits["decode_head_dims"] = tuple_of(DecodeHeadDims{});
    limits["decode_tile_keys"] = kTileKeys;
    limits["max_decode_rows"] = kMaxDecodeRows;
    limits["max_decode_group"] = kMaxDecodeGroup;
    limits["max_decode_kv_heads"] = kMaxDecodeKvHeads;
    limits["max_grid_rows"] = kMaxGridRows;
    limits["max_linear_rows"] = kMaxLinearRows;
    limits["max_linear_products"] = kMaxProducts;
    limits["linear_row_bytes_multiple"] = kLinearRowBytes;
    limits["linear_out_features_multiple"] = kLinearOutFeatures;
    return limits;
}

}  // namespace

PYBIND11_MODULE(_extension, module) {
    module.doc() = "Compiled part of llama_te_infer.";
    module.def("build_info", &build_info, "Return how this extension was compiled.");
    module.def("cuda_problem", &problem_of_cuda,
               "Run an empty kernel on the current GPU. Return None where it runs, else the reason.");
    module.def("limits", &limits, "Return the sizes and types that the kernels take, also in a build without CUDA.");
    bind_cache(module);
    bind_attention(module);
    bind_linear(module);
    bind_elementwise(module);
    bind_sampling(module);
}

}  // namespace llama_te::bindings
