// The Python module `llama_te_infer._extension`: what it was built with, and later its kernels.

#include <pybind11/pybind11.h>

#ifdef LLAMA_TE_CUDA_ARCHITECTURES
#include "probe.h"
#endif

namespace py = pybind11;

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

}  // namespace

PYBIND11_MODULE(_extension, module) {
    module.doc() = "Compiled part of llama_te_infer.";
    module.def("build_info", &build_info, "What this extension was compiled with.");
    module.def("cuda_problem", &cuda_problem,
               "Run an empty kernel on the current GPU: None where that works, else why it does not.");
}
