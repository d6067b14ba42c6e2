// How Python passes arguments: addresses as integers, strides in bytes.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "include/cache.h"

namespace llama_te::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;
// A cache: its address and the strides of blocks, places and heads.
using Memory = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
// A page table: its address, 0 for none, and its stride.
using Table = std::tuple<Address, std::int64_t>;

template <typename Value>
Value *pointer(Address address) {
    return reinterpret_cast<Value *>(address);
}

// The integer of a Python argument; throws TypeError or ValueError with the argument's name if it is none from `least`
// to `most`.
std::int64_t integer(const char *name, py::handle value, std::int64_t least, std::int64_t most);

inline CacheMemory memory_of(const Memory &memory) {
    const auto &[data, block_stride, place_stride, head_stride] = memory;
    return {pointer<char>(data), block_stride, place_stride, head_stride};
}

inline CacheIndex index_of(const Table &page_table, std::int32_t capacity, std::int32_t blocks,
                           std::int32_t block_places) {
    return {pointer<const std::int32_t>(std::get<0>(page_table)), std::get<1>(page_table), capacity, blocks,
            block_places};
}

// From a function that takes arguments as a structure to one that takes them one by one: a function that runs or checks
// an operator on the host, and one that launches it on a GPU, which also takes a device and a stream.
template <typename Arguments, typename... Parameters>
auto on_host(Arguments (*make)(Parameters...), void (*run)(const Arguments &)) {
    return [make, run](Parameters... parameters) {
        const Arguments arguments = make(parameters...);
        const py::gil_scoped_release released;  // loops on the CPU can take long
        run(arguments);
    };
}

template <typename Arguments, typename... Parameters>
auto on_gpu(Arguments (*make)(Parameters...), void (*run)(const Arguments &, int, Address)) {
    return [make, run](int device, Address stream, Parameters... parameters) {
        run(make(parameters...), device, stream);
    };
}

// Defines a function of the module whose arguments have these names.
template <typename Function, typename... Names>
void define(py::module_ &module, const char *name, Function function, Names... names) {
    module.def(name, function, py::arg(names)...);
}

void bind_cache(py::module_ &module);
void bind_attention(py::module_ &module);
void bind_linear(py::module_ &module);
void bind_elementwise(py::module_ &module);

}  // namespace llama_te::bindings
