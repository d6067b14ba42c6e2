#include "arguments.h"

namespace llama_te::bindings {

namespace {

// A value for a message; for most types their name, since a value may be long.
std::string shown(py::handle value) {
    int overflow = 0;
    if (PyLong_CheckExact(value.ptr())) {
        const std::int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
        // Python refuses to write integers of many digits.
        return overflow == 0 ? std::to_string(number) : overflow < 0 ? "less than -2**63" : "2**63 or more";
    }
    if (value.is_none() || PyBool_Check(value.ptr()) || PyFloat_CheckExact(value.ptr())) {
        return py::repr(value).cast<std::string>();
    }
    return text_of("<", Py_TYPE(value.ptr())->tp_name, ">");
}

}  // namespace

Launch launch_for(Where where, const Tensor &tensor) {
    const auto check_on = [&](const char *device_type, const char *wanted) {
        if (!tensor.is_on(device_type)) {
            refuse(text_of(tensor.name, " is on ", py::str(tensor.device).cast<std::string>(), "; it must be on ", wanted,
                           "."));
        }
    };
    if (where == Where::kCpu) {
        check_on("cpu", "the CPU");
    }
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    if (where == Where::kCuda) {
        check_on("cuda", "a CUDA GPU");
        return launch_for(tensor);
    }
#endif
    return {};
}

std::int64_t integer(const Name &name, py::handle value, std::int64_t least, std::int64_t most) {
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) {
        throw py::type_error(text_of(name, "=", shown(value), ": it must be an integer."));
    }
    int overflow = 0;
    const std::int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0 || number < least || number > most) {
        refuse(text_of(name, "=", shown(value), ": allowed are ", least, " to ", most, "."));
    }
    return number;
}

float real(const Name &name, py::handle value) {
    const bool is_number = PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr());
    const double wide = is_number && !PyBool_Check(value.ptr()) ? PyFloat_AsDouble(value.ptr()) : -1;
    if (!is_number || PyBool_Check(value.ptr()) || PyErr_Occurred()) {
        PyErr_Clear();  // an integer beyond all floats
        throw py::type_error(text_of(name, "=", shown(value), ": it must be a float."));
    }
    return static_cast<float>(wide);
}

bool boolean(const Name &name, py::handle value) {
    if (!PyBool_Check(value.ptr())) {
        throw py::type_error(text_of(name, "=", shown(value), ": it must be True or False."));
    }
    return value.is(py::handle(Py_True));
}

}  // namespace llama_te::bindings
