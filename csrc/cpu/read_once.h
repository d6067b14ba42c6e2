// Reading numbers that another thread may write at the same time.

#pragma once

namespace llama_te {

// Reads a number exactly once, so that what a check has seen is what the code behind the check uses.
template <typename Number>
Number read_once(const Number &number) {
    return *static_cast<const volatile Number *>(&number);
}

}  // namespace llama_te
