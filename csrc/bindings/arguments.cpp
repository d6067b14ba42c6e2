#include "arguments.h"

namespace llama_te::bindings {

std::int64_t integer(const char *name, py::handle value, std::int64_t least, std::int64_t most) {
    const auto text = [&] { return name + ("=" + py::repr(value).cast<std::string>()); };
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) {
        throw py::type_error(text() + ": it must be an integer");
    }
    int overflow = 0;
    const std::int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0 || number < least || number > most) {
        throw py::value_error(text() + ": allowed are " + std::to_string(least) + " to " + std::to_string(most));
    }
    return number;
}

}  // namespace llama_te::bindings
