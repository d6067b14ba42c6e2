#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "include/element.h"

namespace llama_te::bindings {

namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

constexpr std::pair<const char *, int> kDTypes[] = {  // in the order of DType
    {"bfloat16", 2}, {"float16", 2}, {"float32", 4}, {"float64", 8},
    {"float8_e4m3fn", 1}, {"int32", 4}, {"int64", 8}, {"bool", 1}, {"uint8", 1}};
constexpr int kDTypeCount = static_cast<int>(DType::kOther);

// What the extension uses of torch, looked up once. Methods and properties are those of the class: an attribute that
// somebody sets on a tensor does not replace them.
struct Torch {
    py::object tensor, parameter, strided, cpu, current_stream, is_grad_enabled;
    py::object dtype, device, layout, shape, requires_grad;              // properties
    py::object stride, data_ptr, storage_offset, untyped_storage;        // methods
    py::object dtypes[kDTypeCount];
};

const Torch &torch() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
    return storage
        .call_once_and_store_result([] {
            const py::module_ module = py::module_::import("torch");
            const py::object tensor = module.attr("Tensor");
            Torch found = {tensor,
                           module.attr("nn").attr("Parameter"),
                           module.attr("strided"),
                           module.attr("device")("cpu"),
                           module.attr("cuda").attr("current_stream"),
                           module.attr("is_grad_enabled"),
                           tensor.attr("dtype"),
                           tensor.attr("device"),
                           tensor.attr("layout"),
                           tensor.attr("shape"),
                           tensor.attr("requires_grad"),
                           tensor.attr("stride"),
                           tensor.attr("data_ptr"),
                           tensor.attr("storage_offset"),
                           tensor.attr("untyped_storage"),
                           {}};
            for (int i = 0; i < kDTypeCount; ++i) {
                found.dtypes[i] = module.attr(kDTypes[i].first);
            }
            return found;
        })
        .get_stored();
}

py::object owned(PyObject *object) {
    if (object == nullptr) {
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(object);
}

py::object property(const py::object &descriptor, py::handle object) {
    return owned(Py_TYPE(descriptor.ptr())
                     ->tp_descr_get(descriptor.ptr(), object.ptr(), reinterpret_cast<PyObject *>(Py_TYPE(object.ptr()))));
}

py::object call(const py::object &method, py::handle object) {
    PyObject *const arguments[] = {object.ptr()};
    return owned(PyObject_Vectorcall(method.ptr(), arguments, 1, nullptr));
}

std::int64_t number(py::handle integer) {
    const std::int64_t value = PyLong_AsLongLong(integer.ptr());
    if (value == -1 && PyErr_Occurred()) {
        throw py::error_already_set();
    }
    return value;
}

// Adds the product of two numbers that are not negative. Returns false where the sum would overflow.
bool add_product(std::int64_t &sum, std::int64_t one, std::int64_t other) {
    if (one != 0 && other > (kMost - sum) / one) {
        return false;
    }
    sum += one * other;
    return true;
}

bool equal(py::handle one, py::handle other) {
    const int result = PyObject_RichCompareBool(one.ptr(), other.ptr(), Py_EQ);
    if (result < 0) {
        throw py::error_already_set();
    }
    return result == 1;
}

std::string text(py::handle object) {
    return py::str(object).cast<std::string>();
}

// Numbers separated by commas.
std::string listed(const std::int64_t *numbers, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) {
        text += text_of(i > 0 ? ", " : "", numbers[i]);
    }
    return text;
}

void check_place(const Tensor &tensor, const py::object &device, std::initializer_list<std::int64_t> shape,
                 const char *meaning) {
    if (!equal(tensor.device, device)) {
        refuse(text_of(tensor.name, " is on ", text(tensor.device), "; it must be on ", text(device),
                       ", as the other tensors."));
    }
    const auto fits = [](std::int64_t wanted, std::int64_t size) { return wanted == kAny || wanted == size; };
    if (static_cast<std::size_t>(tensor.rank) != shape.size() ||
        !std::equal(shape.begin(), shape.end(), tensor.shape, fits)) {
        std::string wanted;
        for (const std::int64_t size : shape) {
            wanted += text_of(wanted.empty() ? "" : ", ", size == kAny ? "any" : std::to_string(size));
        }
        refuse(text_of(tensor.name, " has the shape ", tensor.shape_text(), "; it must be [", wanted,
                       "], which is ", meaning, "."));
    }
    const int last = tensor.rank - 1;
    if (last >= 0 && tensor.shape[last] > 1 && tensor.strides[last] != 1) {
        refuse(text_of(tensor.name, " has the strides ", tensor.strides_text(),
                       ": its last dimension must be contiguous."));
    }
}

}  // namespace

void refuse(const std::string &message) {
    throw std::invalid_argument(message);
}

std::string part_of_text(const Name &name) {
    if (name.list == nullptr) {
        return name.text;
    }
    return text_of(name.list, "[", name.item, "]", *name.text != '\0' ? "." : "", name.text);
}

Tensor::Tensor(Name name_of_argument, py::handle python_object) : name(name_of_argument), object(python_object) {
    const Torch &known = torch();
    const py::handle type = py::type::handle_of(object);
    if (!type.is(known.tensor) && !type.is(known.parameter)) {
        throw py::type_error(text_of(name, " is ", object.is_none() ? "None" : text_of("a ", Py_TYPE(object.ptr())->tp_name),
                                     ": it must be a torch.Tensor, and no subclass but torch.nn.Parameter."));
    }
    const py::object layout = property(known.layout, object);
    if (!layout.is(known.strided)) {
        throw py::type_error(text_of(name, " has the layout ", text(layout), ": it must be dense (torch.strided)."));
    }
    std::int64_t room;
    std::int64_t begin;
    try {
        device = property(known.device, object);
        const py::object torch_dtype = property(known.dtype, object);
        const auto *const found =
            std::find_if(known.dtypes, known.dtypes + kDTypeCount,
                         [&](const py::object &candidate) { return candidate.is(torch_dtype); });
        dtype = static_cast<DType>(found - known.dtypes);
        itemsize = dtype == DType::kOther ? static_cast<int>(number(torch_dtype.attr("itemsize")))
                                          : kDTypes[static_cast<int>(dtype)].second;
        const py::object sizes = property(known.shape, object);
        const py::object steps = call(known.stride, object);
        const auto dimensions = PyTuple_GET_SIZE(sizes.ptr());
        if (dimensions > kMaxRank) {
            refuse(text_of(name, " has ", dimensions, " dimensions: allowed are up to ", kMaxRank, "."));
        }
        rank = static_cast<int>(dimensions);
        for (int i = 0; i < rank; ++i) {
            shape[i] = number(PyTuple_GET_ITEM(sizes.ptr(), i));
            strides[i] = number(PyTuple_GET_ITEM(steps.ptr(), i));
        }
        data = reinterpret_cast<char *>(static_cast<std::uintptr_t>(
            PyLong_AsUnsignedLongLong(call(known.data_ptr, object).ptr())));
        begin = number(call(known.storage_offset, object));
        room = PyObject_Size(call(known.untyped_storage, object).ptr());
        if (PyErr_Occurred()) {
            throw py::error_already_set();
        }
    } catch (py::error_already_set &error) {
        // Wrappers of torch.func and nested tensors have no memory of their own.
        const std::string message = text_of(name, " has no dense memory: it must be a torch.Tensor that has.");
        py::raise_from(error, PyExc_TypeError, message.c_str());
        throw py::error_already_set();
    }
    const bool has_elements = std::find(shape, shape + rank, 0) == shape + rank;
    std::int64_t elements = has_elements ? 1 : 0;
    bool fits = begin >= 0;
    for (int i = 0; has_elements && i < rank; ++i) {
        fits = fits && strides[i] >= 0 && add_product(elements, shape[i] - 1, strides[i]);
    }
    std::int64_t end = 0;
    fits = fits && add_product(end, begin, itemsize) && add_product(end, elements, itemsize) && end <= room;
    if (has_elements && !fits) {
        refuse(text_of(name, " has the shape ", shape_text(), " and the strides ", strides_text(),
                       ", but its storage has only ", room,
                       " bytes: it was freed or made smaller. Pass a tensor with all of its memory."));
    }
    bytes = elements * itemsize;
}

bool Tensor::contiguous(int first_dimension) const {
    std::int64_t expected = 1;
    for (int i = rank - 1; i >= first_dimension && !empty(); --i) {
        if (shape[i] != 1 && strides[i] != expected) {
            return false;
        }
        expected *= shape[i];
    }
    return true;
}

std::int64_t Tensor::byte_stride(int dimension) const {
    if (empty()) {
        return 0;
    }
    if (shape[dimension] != 1) {
        return strides[dimension] * itemsize;
    }
    std::int64_t stride = 1;
    for (int i = rank - 1; i > dimension; --i) {
        stride = (shape[i] == 1 ? stride : strides[i]) * shape[i];
    }
    return stride * itemsize;
}

std::int32_t Tensor::size(int dimension, const char *letter) const {
    if (shape[dimension] > std::numeric_limits<std::int32_t>::max()) {
        refuse(text_of(name, " has ", letter, "=", shape[dimension], ": allowed are less than 2**31."));
    }
    return static_cast<std::int32_t>(shape[dimension]);
}

std::string Tensor::dtype_name() const {
    if (dtype != DType::kOther) {
        return kDTypes[static_cast<int>(dtype)].first;
    }
    return text(property(torch().dtype, object)).substr(std::char_traits<char>::length("torch."));
}

std::string Tensor::shape_text() const {
    return "[" + listed(shape, rank) + "]";
}

std::string Tensor::strides_text() const {
    return "(" + listed(strides, rank) + (rank == 1 ? ",)" : ")");
}

bool Tensor::is_on(const char *device_type) const {
    return text(device.attr("type")) == device_type;
}

void check(const Tensor &tensor, DType dtype, const py::object &device, std::initializer_list<std::int64_t> shape,
           const char *meaning) {
    if (tensor.dtype != dtype) {
        refuse(text_of(tensor.name, " is ", tensor.dtype_name(), "; it must be ",
                       kDTypes[static_cast<int>(dtype)].first, "."));
    }
    check_place(tensor, device, shape, meaning);
}

void check_like(const Tensor &tensor, const Tensor &like, std::initializer_list<std::int64_t> shape,
                const char *meaning) {
    check(tensor, like.dtype, like.device, shape, meaning);
}

ElementType element_of(const Tensor &tensor) {
    switch (tensor.dtype) {
        case DType::kBFloat16:
            return ElementType::kBFloat16;
        case DType::kFloat16:
            return ElementType::kFloat16;
        case DType::kFloat32:
            return ElementType::kFloat32;
        default:
            refuse(text_of(tensor.name, " is ", tensor.dtype_name(), ": allowed are bfloat16, float16, float32."));
    }
}

void check_floating(const Tensor &tensor) {
    if (tensor.dtype > DType::kFloat64) {
        refuse(text_of(tensor.name, " is ", tensor.dtype_name(),
                       ": allowed are bfloat16, and on a CPU also float16, float32 and float64."));
    }
}

void check_contiguous(const Tensor &tensor) {
    if (!tensor.contiguous()) {
        refuse(text_of(tensor.name, " has the strides ", tensor.strides_text(), ": it must be contiguous."));
    }
}

void check_aligned(const Tensor &tensor) {
    if (tensor.empty()) {
        return;
    }
    if (reinterpret_cast<std::uintptr_t>(tensor.data) % kVectorBytes != 0) {
        refuse(text_of(tensor.name, " starts at an address that is not a multiple of ", kVectorBytes,
                       " bytes: pass a tensor whose storage_offset is a multiple of ", kVectorBytes,
                       " bytes, or a copy."));
    }
    for (int i = 0; i < tensor.rank - 1; ++i) {
        if (tensor.byte_stride(i) % kVectorBytes != 0) {
            refuse(text_of(tensor.name, " has a stride of ", tensor.byte_stride(i),
                           " bytes; all but the last dimension's must be multiples of ", kVectorBytes, " bytes."));
        }
    }
}

void check_written(const char *operation, const Tensor &tensor) {
    check_no_gradient(operation, tensor);
    if (tensor.empty()) {
        return;
    }
    int order[kMaxRank];
    int *end = order;
    for (int i = 0; i < tensor.rank; ++i) {
        if (tensor.shape[i] > 1) {
            *end++ = i;
        }
    }
    std::sort(order, end, [&](int one, int other) { return tensor.strides[one] < tensor.strides[other]; });
    std::int64_t extent = 1;  // of the dimensions with smaller strides
    for (const int *dimension = order; dimension != end; ++dimension) {
        if (tensor.strides[*dimension] < extent) {
            refuse(text_of(tensor.name, " has the shape ", tensor.shape_text(), " and the strides ",
                           tensor.strides_text(),
                           ": elements share memory. The operator writes them, so pass a tensor of distinct elements."));
        }
        extent += (tensor.shape[*dimension] - 1) * tensor.strides[*dimension];
    }
}

bool overlap(const Tensor &one, const Tensor &other) {
    const auto begin = [](const Tensor &tensor) { return reinterpret_cast<std::uintptr_t>(tensor.data); };
    const auto end = [&](const Tensor &tensor) { return begin(tensor) + static_cast<std::uintptr_t>(tensor.bytes); };
    return !one.empty() && !other.empty() && begin(one) < end(other) && begin(other) < end(one);
}

void check_apart(const Tensor &one, const Tensor &other) {
    if (overlap(one, other)) {
        refuse(text_of(one.name, " and ", other.name, " share memory: pass tensors that do not overlap."));
    }
}

void check_all_apart(const std::vector<const Tensor *> &tensors) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        for (std::size_t j = i + 1; j < tensors.size(); ++j) {
            check_apart(*tensors[i], *tensors[j]);
        }
    }
}

void check_no_gradient(const char *operation, const Tensor &tensor) {
    const Torch &known = torch();
    if (property(known.requires_grad, tensor.object).cast<bool>() && known.is_grad_enabled().cast<bool>()) {
        refuse(text_of(tensor.name, " requires a gradient, which ", operation,
                       " does not have: call it under torch.no_grad()."));
    }
}

#ifdef LLAMA_TE_CUDA_ARCHITECTURES
Launch launch_for(const Tensor &tensor) {
    const py::object stream = torch().current_stream(tensor.device).attr("cuda_stream");
    return {static_cast<int>(number(tensor.device.attr("index"))), py::cast<std::uintptr_t>(stream)};
}
#endif

const py::object &cpu() {
    return torch().cpu;
}

}  // namespace llama_te::bindings
