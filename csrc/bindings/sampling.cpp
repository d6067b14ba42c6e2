// draw.
//
// Shapes: B rows, V vocabulary.

#include "sampling/draw.h"

#include "arguments.h"

namespace llama_te::bindings {

namespace {

template <Where kWhere>
std::optional<Call<DrawArguments>> draw_arguments(py::handle logits_tensor, py::handle numbers_tensor,
                                                  py::handle integers_tensor, py::handle tokens_tensor) {
    const Tensor logits({"logits"}, logits_tensor);
    const Tensor numbers({"numbers"}, numbers_tensor);
    const Tensor integers({"integers"}, integers_tensor);
    const Tensor tokens({"tokens"}, tokens_tensor);
    const ElementType element = element_of(logits);
    check_like(logits, logits, {kAny, kAny}, "[B, V]");
    const std::int64_t rows = logits.shape[0];
    if (logits.shape[1] == 0) {
        refuse(text_of("logits has the shape ", logits.shape_text(), ": there must be a token to draw."));
    }
    check(numbers, DType::kFloat32, logits.device, {rows, 3}, "[B, 3]");
    check(integers, DType::kInt64, logits.device, {rows, 3}, "[B, 3]");
    check(tokens, DType::kInt64, logits.device, {rows}, "[B]");
    check_contiguous(numbers);
    check_contiguous(integers);
    check_contiguous(tokens);
    check_no_gradient("draw", logits);
    check_written("draw", tokens);
    for (const Tensor *const read : {&logits, &numbers, &integers}) {
        check_apart(tokens, *read);
    }
    const Launch launch = launch_for(kWhere, logits);
    if (rows == 0) {
        return std::nullopt;
    }
    return Call<DrawArguments>{{logits.data, logits.byte_stride(0), element, logits.size(0, "B"), logits.size(1, "V"),
                                numbers.as<const float>(), integers.as<const std::int64_t>(),
                                tokens.as<std::int64_t>()},
                               launch,
                               {}};
}

}  // namespace

void bind_sampling(py::module_ &module) {
    define(module, "draw_cpu", on_host(draw_arguments<Where::kCpu>, draw_cpu), "logits", "numbers", "integers",
           "tokens");
}

}  // namespace llama_te::bindings
