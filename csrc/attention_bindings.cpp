// Decode attention's kernel, for CUDA alone: on a CPU, PyTorch attends.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "decode_attention.h"

namespace py = pybind11;

void bind_attention(py::module_ &module) {
    module.def("decode_attention_workspace", &llama_te::decode_attention_workspace, py::arg("rows"),
               py::arg("kv_heads"), py::arg("group"), py::arg("head_dim"), py::arg("capacity"));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    using Address = std::uintptr_t;
    // A cache: its address and the strides of blocks, places and heads.
    using Memory = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
    const auto memory_of = [](const Memory &memory) -> llama_te::CacheMemory {
        return {reinterpret_cast<char *>(std::get<0>(memory)), std::get<1>(memory), std::get<2>(memory),
                std::get<3>(memory)};
    };
    module.def(
        "decode_attention_cuda",
        [memory_of](int device, Address stream, int element, Address qkv, std::int64_t qkv_row_stride,
                    std::int32_t rows, std::int32_t kv_heads, std::int32_t group, std::int32_t head_dim,
                    Address cos_sin, std::int64_t cos_sin_stride, std::int32_t positions, Address start,
                    const std::tuple<Address, std::int64_t> &page_table, std::int32_t capacity, std::int32_t blocks,
                    std::int32_t block_places, const Memory &key, const Memory &value, float scale, Address output,
                    Address workspace) {
            llama_te::DecodeAttentionArguments a = {};
            a.element = static_cast<llama_te::ElementType>(element);
            a.qkv = reinterpret_cast<const char *>(qkv);
            a.qkv_row_stride = qkv_row_stride;
            a.rows = rows;
            a.kv_heads = kv_heads;
            a.group = group;
            a.head_dim = head_dim;
            a.cos_sin = reinterpret_cast<const char *>(cos_sin);
            a.cos_sin_stride = cos_sin_stride;
            a.positions = positions;
            a.start = reinterpret_cast<const std::int32_t *>(start);
            a.index = {reinterpret_cast<const std::int32_t *>(std::get<0>(page_table)), std::get<1>(page_table),
                       capacity, blocks, block_places};
            a.key = memory_of(key);
            a.value = memory_of(value);
            a.scale = scale;
            a.output = reinterpret_cast<char *>(output);
            a.workspace = reinterpret_cast<std::int32_t *>(workspace);
            llama_te::decode_attention_cuda(a, device, stream);
        },
        py::arg("device"), py::arg("stream"), py::arg("element"), py::arg("qkv"), py::arg("qkv_row_stride"),
        py::arg("rows"), py::arg("kv_heads"), py::arg("group"), py::arg("head_dim"), py::arg("cos_sin"),
        py::arg("cos_sin_stride"), py::arg("positions"), py::arg("start"), py::arg("page_table"), py::arg("capacity"),
        py::arg("blocks"), py::arg("block_places"), py::arg("key"), py::arg("value"), py::arg("scale"),
        py::arg("output"), py::arg("workspace"));
#endif
}
