// From a value known at run time to a template argument.

#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace llama_te {

// The values that a kernel is compiled for.
template <auto... kValues>
struct Values {};

// Calls `function(std::integral_constant<Value, v>{})` for the one v of the values that equals `value`. Throws
// std::invalid_argument where none does; `name` is the operator's, for the message.
template <auto... kValues, typename Value, typename Function>
void dispatch(const char *name, Values<kValues...>, Value value, const Function &function) {
    const auto call_if_equal = [&](auto constant) {
        if (value != constant.value) {
            return false;
        }
        function(constant);
        return true;
    };
    if (!(call_if_equal(std::integral_constant<decltype(kValues), kValues>{}) || ...)) {
        throw std::invalid_argument(std::string(name) + " has no kernel for " +
                                    std::to_string(static_cast<long long>(value)));
    }
}

}  // namespace llama_te
