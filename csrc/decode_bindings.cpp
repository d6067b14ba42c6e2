// What a decoding step calls, for CUDA alone: on a CPU, PyTorch does it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "elementwise.h"
#include "linear.h"
#include "tokens.h"

namespace py = pybind11;

void bind_decode([[maybe_unused]] py::module_ &module) {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    using Address = std::uintptr_t;
    py::class_<llama_te::LinearArguments>(module, "Product")
        .def(py::init([](Address input, Address weight, int weight_type, Address scale, Address norm_weight,
                         float epsilon, Address residual, bool swiglu, Address output, Address partials,
                         Address tickets, std::int32_t rows, std::int32_t in_features, std::int32_t out_features) {
                 llama_te::LinearArguments a = {};
                 a.input = reinterpret_cast<const char *>(input);
                 a.weight = reinterpret_cast<const char *>(weight);
                 a.scale = reinterpret_cast<const float *>(scale);
                 a.norm_weight = reinterpret_cast<const char *>(norm_weight);
                 a.epsilon = epsilon;
                 a.residual = reinterpret_cast<const char *>(residual);
                 a.output = reinterpret_cast<char *>(output);
                 a.partials = reinterpret_cast<float *>(partials);
                 a.tickets = reinterpret_cast<std::int32_t *>(tickets);
                 a.rows = rows;
                 a.in_features = in_features;
                 a.out_features = out_features;
                 a.weight_type = static_cast<llama_te::WeightType>(weight_type);
                 a.swiglu = swiglu;
                 return a;
             }),
             py::kw_only(), py::arg("input"), py::arg("weight"), py::arg("weight_type"), py::arg("scale"),
             py::arg("norm_weight"), py::arg("epsilon"), py::arg("residual"), py::arg("swiglu"), py::arg("output"),
             py::arg("partials"), py::arg("tickets"), py::arg("rows"), py::arg("in_features"),
             py::arg("out_features"));
    module.def(
        "linear_cuda",
        [](int device, Address stream, const std::vector<llama_te::LinearArguments> &products) {
            llama_te::linear_cuda(products, device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("products"));
    module.def("linear_partials", &llama_te::linear_partials, py::arg("device"));
    module.def("linear_tickets", &llama_te::linear_tickets, py::arg("device"));
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
