// logprobs on the CPU. Laptops and CI run it.

#include "sampling/logprobs.h"

#include "cpu/alone.h"
#include "cpu/numbers.h"
#include "include/dispatch.h"
#include "sampling/logprobs_row.h"

namespace llama_te {

namespace {

template <typename Element>
void logprobs_rows(const LogprobsArguments &a) {
    Alone alone;
    RowOfFloats logits(a.vocabulary);
    for (std::int32_t row = 0; row < a.rows; ++row) {
        const auto *const numbers = reinterpret_cast<const Element *>(a.logits + row * a.row_bytes);
        for (std::int32_t token = 0; token < a.vocabulary; ++token) {
            logits.set(token, static_cast<float>(numbers[token].get()));
        }
        logprobs_row(alone, logits, a, row);
    }
}

}  // namespace

void logprobs_cpu(const LogprobsArguments &arguments) {
    dispatch("logprobs", Elements{}, arguments.element, [&](auto element) {
        logprobs_rows<typename Number<decltype(element)::value>::Type>(arguments);
    });
}

}  // namespace llama_te
