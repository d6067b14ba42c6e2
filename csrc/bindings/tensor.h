// Tensors that Python passes. The extension does not link torch, so it asks torch's Python objects for their memory.
//
// These checks keep kernels inside the memory of their tensors, whatever Python passes. An error names the argument.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "include/element.h"

namespace llama_te::bindings {

namespace py = pybind11;

// The dtypes that operators take.
enum class DType { kBFloat16, kFloat16, kFloat32, kFloat64, kFloat8E4M3, kInt32, kInt64, kBool, kUInt8, kOther };

// The name of an argument, or of the field `text` of an item of the argument `list`.
struct Name {
    const char *text;
    const char *list = nullptr;
    int item = 0;
};

inline std::string part_of_text(const char *part) {
    return part;
}
inline const std::string &part_of_text(const std::string &part) {
    return part;
}
template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
std::string part_of_text(Integer part) {
    return std::to_string(part);
}
std::string part_of_text(const Name &name);

// Returns the parts as one text. Not by streams: where the extension has a C++ library of its own beside torch's, their
// locales get mixed up, and writing an integer to a stream crashes.
template <typename... Parts>
std::string text_of(const Parts &...parts) {
    std::string text;
    (text.append(part_of_text(parts)), ...);
    return text;
}

constexpr int kMaxRank = 8;

// A torch.Tensor or torch.nn.Parameter with dense memory. All its elements lie inside its storage.
struct Tensor {
    // Throws TypeError if the object is no such tensor, ValueError if its storage is too small for it.
    Tensor(Name name, py::handle object);

    Name name;
    py::handle object;  // the caller holds it
    py::object device;
    DType dtype;
    int itemsize;
    int rank;
    std::int64_t shape[kMaxRank];
    std::int64_t strides[kMaxRank];  // in elements, as torch has them
    char *data;
    std::int64_t bytes;  // from the first to behind the last element

    bool empty() const {
        return bytes == 0;
    }
    bool contiguous(int first_dimension = 0) const;
    // The stride of a dimension in bytes. torch leaves that of a dimension of size 1 open: here it is a contiguous one.
    std::int64_t byte_stride(int dimension) const;
    // The size of a dimension. Throws ValueError if it is 2^31 or more; `letter` names the dimension.
    std::int32_t size(int dimension, const char *letter) const;
    template <typename Value>
    Value *as() const {
        return reinterpret_cast<Value *>(data);
    }
    std::string dtype_name() const;
    std::string shape_text() const;
    std::string strides_text() const;
    bool is_on(const char *device_type) const;
};

// The number of elements or rows is free.
constexpr std::int64_t kAny = -1;

// Throws ValueError if the tensor has another dtype, device or shape, or gaps in its last dimension. `meaning` explains
// the shape in the message.
void check(const Tensor &tensor, DType dtype, const py::object &device, std::initializer_list<std::int64_t> shape,
           const char *meaning);
// The same for a tensor of the dtype of `like`.
void check_like(const Tensor &tensor, const Tensor &like, std::initializer_list<std::int64_t> shape,
                const char *meaning);
// The element of caches and activations that the dtype is: bfloat16, float16 or float32.
ElementType element_of(const Tensor &tensor);
// The dtype is bfloat16, float16, float32 or float64.
void check_floating(const Tensor &tensor);
void check_contiguous(const Tensor &tensor);
// The first element and all strides but the last are multiples of the kernels' vectors.
void check_aligned(const Tensor &tensor);
// The operator writes the tensor: no element has the memory of another one, and torch records nothing for a gradient.
void check_written(const char *operation, const Tensor &tensor);
bool overlap(const Tensor &one, const Tensor &other);
void check_apart(const Tensor &one, const Tensor &other);
void check_all_apart(const std::vector<const Tensor *> &tensors);
// The tensor needs no gradient, which the operator does not have.
void check_no_gradient(const char *operation, const Tensor &tensor);

// The GPU and the current stream of a tensor, which a build without CUDA does not ask for.
struct Launch {
    int device = 0;
    std::uintptr_t stream = 0;
};
Launch launch_for(const Tensor &tensor);

// torch.device("cpu")
const py::object &cpu();

[[noreturn]] void refuse(const std::string &message);

}  // namespace llama_te::bindings
