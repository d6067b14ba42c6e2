// draw on the CPU. Laptops and CI run it.

#include "sampling/draw.h"

#include <vector>

#include "cpu/alone.h"
#include "cpu/numbers.h"
#include "include/dispatch.h"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

template <typename Element>
void draw_rows(const DrawArguments &a) {
    Alone alone;
    std::vector<float> logits(static_cast<std::size_t>(a.vocabulary));
    const auto logit_of = [&](std::int32_t token) { return logits[static_cast<std::size_t>(token)]; };
    for (std::int32_t row = 0; row < a.rows; ++row) {
        const auto *const numbers = reinterpret_cast<const Element *>(a.logits + row * a.row_bytes);
        const Adjustment adjusted = adjustment_of(a, row);
        for (std::int32_t token = 0; token < a.vocabulary; ++token) {
            const auto number = static_cast<float>(numbers[token].get());
            logits[static_cast<std::size_t>(token)] = adjusted(number, token);
        }
        a.tokens[row] = draw_row(alone, logit_of, choice_of(a, row), a.vocabulary);
        record(a, row, a.tokens[row]);
    }
}

}  // namespace

void draw_cpu(const DrawArguments &arguments) {
    dispatch("draw", Elements{}, arguments.element, [&](auto element) {
        draw_rows<typename Number<decltype(element)::value>::Type>(arguments);
    });
}

}  // namespace llama_te
