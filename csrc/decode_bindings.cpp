// What a decoding step calls, for CUDA alone: on a CPU, PyTorch does it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "elementwise.h"
#include "linear.h"
#include "tokens.h"

namespace py = pybind11;

void bind_decode([[maybe_unused]] py::module_ &module) {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    using Address = std::uintptr_t;
    // Input, weight, output, scale, norm weight, epsilon, residual, swiglu, input features, output features.
    using Product = std::tuple<Address, Address, Address, Address, Address, float, Address, bool, std::int32_t,
                               std::int32_t>;
    module.def(
        "linear_cuda",
        [](int device, Address stream, std::int32_t rows, int weight_type, Address partials, Address tickets,
           const std::vector<Product> &products) {
            std::vector<llama_te::LinearArguments> arguments;
            for (const auto &[input, weight, output, scale, norm_weight, epsilon, residual, swiglu, in_features,
                              out_features] : products) {
                arguments.push_back({reinterpret_cast<const char *>(input), reinterpret_cast<const char *>(weight),
                                     reinterpret_cast<const float *>(scale),
                                     reinterpret_cast<const char *>(norm_weight), epsilon,
                                     reinterpret_cast<const char *>(residual), reinterpret_cast<char *>(output),
                                     reinterpret_cast<float *>(partials), reinterpret_cast<std::int32_t *>(tickets),
                                     rows, in_features, out_features, static_cast<llama_te::WeightType>(weight_type),
                                     swiglu});
            }
            llama_te::linear_cuda(arguments, device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("rows"), py::arg("weight_type"), py::arg("partials"),
        py::arg("tickets"), py::arg("products"));
    module.def("linear_partials", &llama_te::linear_partials, py::arg("device"));
    module.def("linear_semaphores", &llama_te::linear_tickets, py::arg("device"));
    module.def(
        "embed_cuda",
        [](int device, Address stream, Address tokens, Address table, Address output, std::int32_t rows,
           std::int64_t vocabulary, std::int64_t row_bytes) {
            llama_te::embed_cuda({reinterpret_cast<const std::int64_t *>(tokens), reinterpret_cast<const char *>(table),
                                  reinterpret_cast<char *>(output), rows, vocabulary, row_bytes},
                                 device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("tokens"), py::arg("table"), py::arg("output"), py::arg("rows"),
        py::arg("vocabulary"), py::arg("row_bytes"));
    module.def(
        "greedy_cuda",
        [](int device, Address stream, Address logits, std::int64_t row_stride, std::int32_t rows,
           std::int32_t vocabulary, Address tokens, Address lengths, Address best, Address tickets) {
            llama_te::greedy_cuda(
                {reinterpret_cast<const char *>(logits), row_stride, rows, vocabulary,
                 reinterpret_cast<std::int64_t *>(tokens), reinterpret_cast<std::int32_t *>(lengths),
                 reinterpret_cast<std::uint64_t *>(best), reinterpret_cast<std::int32_t *>(tickets)},
                device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("logits"), py::arg("row_stride"), py::arg("rows"),
        py::arg("vocabulary"), py::arg("tokens"), py::arg("lengths"), py::arg("best"), py::arg("tickets"));
    module.def(
        "rms_norm_cuda",
        [](int device, Address stream, Address hidden, Address addend, Address weight, float epsilon, Address output,
           std::int32_t rows, std::int32_t features) {
            llama_te::rms_norm_cuda({reinterpret_cast<char *>(hidden), reinterpret_cast<const char *>(addend),
                                     reinterpret_cast<const char *>(weight), epsilon, reinterpret_cast<char *>(output),
                                     rows, features},
                                    device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("hidden"), py::arg("addend"), py::arg("weight"),
        py::arg("epsilon"), py::arg("output"), py::arg("rows"), py::arg("features"));
    module.def(
        "swiglu_cuda",
        [](int device, Address stream, Address input, Address output, std::int32_t rows, std::int32_t features) {
            llama_te::swiglu_cuda(
                {reinterpret_cast<const char *>(input), reinterpret_cast<char *>(output), rows, features}, device,
                stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("input"), py::arg("output"), py::arg("rows"),
        py::arg("features"));
#endif
}
