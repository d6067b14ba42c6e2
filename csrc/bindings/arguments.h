// What the bindings share: the conversion of numbers, and functions of Python from those that make and run arguments.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "tensor.h"

namespace llama_te::bindings {

// Where an operator runs, which decides what its arguments must be.
enum class Where {
    kCpu,     // the CPU's implementation, here or in PyTorch
    kCuda,    // the kernel
    kChecks,  // nowhere: the kernel's arguments on any device, but row numbers, lengths and pages in host memory
};

// Arguments that are safe to run, the GPU and the stream of a kernel, and the tensors that only a list holds: another
// thread may change the list while an operator runs without Python's lock.
template <typename Arguments>
struct Call {
    Arguments arguments;
    Launch launch;
    py::object held;
};

// Refuses tensors of another device than `where` allows, of which `tensor` is the first. Returns the kernel's launch.
Launch launch_for(Where where, const Tensor &tensor);

// The device where row numbers, lengths and pages must be.
inline const py::object &device_of_values(Where where, const Tensor &tensor) {
    return where == Where::kChecks ? cpu() : tensor.device;
}

// An integer from `least` to `most`, and a number. They throw TypeError or ValueError.
std::int64_t integer(const Name &name, py::handle value, std::int64_t least, std::int64_t most);
float real(const Name &name, py::handle value);
bool boolean(const Name &name, py::handle value);

// A tensor that the caller may leave out, and its address or null.
inline std::optional<Tensor> optional_tensor(const Name &name, py::handle object) {
    return object.is_none() ? std::nullopt : std::optional<Tensor>(std::in_place, name, object);
}

template <typename Value>
Value *data_or_null(const std::optional<Tensor> &tensor) {
    return tensor ? tensor->as<Value>() : nullptr;
}

// From a function that makes arguments of Python's, or nothing if there is nothing to do, to a function for Python that
// checks them, runs them on the host, or launches them on a GPU.
template <typename Arguments, typename... Parameters>
auto checked(std::optional<Call<Arguments>> (*make)(Parameters...)) {
    return [make](Parameters... parameters) { make(parameters...); };
}

template <typename Arguments, typename... Parameters>
auto on_host(std::optional<Call<Arguments>> (*make)(Parameters...), void (*run)(const Arguments &)) {
    return [make, run](Parameters... parameters) {
        if (const auto call = make(parameters...)) {
            const py::gil_scoped_release released;  // loops on the CPU can take long
            run(call->arguments);
        }
    };
}

template <typename Arguments, typename... Parameters>
auto on_gpu(std::optional<Call<Arguments>> (*make)(Parameters...),
            void (*run)(const Arguments &, int, std::uintptr_t)) {
    return [make, run](Parameters... parameters) {
        if (const auto call = make(parameters...)) {
            run(call->arguments, call->launch.device, call->launch.stream);
        }
    };
}

// The name of an argument, and an argument that is None where the caller leaves it out.
inline py::arg argument(const char *name) {
    return py::arg(name);
}
inline py::arg_v argument(const py::arg_v &with_default) {
    return with_default;
}
inline py::arg_v optional(const char *name) {
    return py::arg(name) = py::none();
}

// Defines a function of the module with these arguments: names, or results of `optional`.
template <typename Function, typename... Names>
void define(py::module_ &module, const char *name, Function function, const Names &...names) {
    module.def(name, function, argument(names)...);
}

void bind_cache(py::module_ &module);
void bind_attention(py::module_ &module);
void bind_linear(py::module_ &module);
void bind_elementwise(py::module_ &module);
void bind_sampling(py::module_ &module);

}  // namespace llama_te::bindings
