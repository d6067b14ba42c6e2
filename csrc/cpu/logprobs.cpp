// logprobs on the CPU. Laptops and CI run it.

#include "sampling/logprobs.h"

#include <vector>

#include "cpu/alone.h"
#include "cpu/numbers.h"
#include "include/dispatch.h"
#include "sampling/logprobs_row.h"

namespace llama_te {

namespace {

template <typename Element>
void logprobs_rows(const LogprobsArguments &a) {
    Alone alone;
    std::vector<float> logits(static_cast<std::size_t>(a.vocabulary));
    const auto logit_of = [&](std::int32_t token) { return logits[static_cast<std::size_t>(token)]; };
    for (std::int32_t row = 0; row < a.rows; ++row) {
        const auto *const numbers = reinterpret_cast<const Element *>(a.logits + row * a.row_bytes);
        for (std::int32_t token = 0; token < a.vocabulary; ++token) {
            logits[static_cast<std::size_t>(token)] = static_cast<float>(numbers[token].get());
        }
        logprobs_row(alone, logit_of, a, row);
    }
}

}  // namespace

void logprobs_cpu(const LogprobsArguments &arguments) {
    dispatch("logprobs", Elements{}, arguments.element, [&](auto element) {
        logprobs_rows<typename Number<decltype(element)::value>::Type>(arguments);
    });
}

}  // namespace llama_te
