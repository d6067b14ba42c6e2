// draw on the CPU. Laptops and CI run it.

#include "sampling/draw.h"

#include "cpu/alone.h"
#include "cpu/numbers.h"
#include "include/dispatch.h"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

template <typename Element>
void draw_rows(const DrawArguments &a) {
    Alone alone;
    RowOfFloats logits(a.vocabulary);
    for (std::int32_t row = 0; row < a.rows; ++row) {
        const auto *const numbers = reinterpret_cast<const Element *>(a.logits + row * a.row_bytes);
        const Adjustment adjusted = adjustment_of(a, row);
        for (std::int32_t token = 0; token < a.vocabulary; ++token) {
            logits.set(token, adjusted(static_cast<float>(numbers[token].get()), adjusted.read(token)));
        }
        a.tokens[row] = draw_row(alone, logits, choice_of(a, row), a.vocabulary);
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
