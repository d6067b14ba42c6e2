// draw and logprobs.
//
// Shapes: B rows of the batch, R rows of the tables, V vocabulary, M masks of W words, K likeliest tokens.

#include "sampling/draw.h"

#include <optional>
#include <vector>

#include "arguments.h"
#include "include/integer.h"
#include "sampling/logprobs.h"

namespace llama_te::bindings {

namespace {

constexpr std::int64_t kMaskBits = 32;  // of a word

// The element of logits [B, V] that the operator can read.
ElementType element_of_logits(const char *operation, const Tensor &logits) {
    const ElementType element = element_of(logits);
    check_like(logits, logits, {kAny, kAny}, "[B, V]");
    if (logits.shape[1] == 0) {
        refuse(text_of("logits has the shape ", logits.shape_text(), ": there must be a token."));
    }
    check_no_gradient(operation, logits);
    return element;
}

// The operator may write tensors that share no memory, neither with each other nor with those that it reads.
void check_written_apart(const char *operation, const std::vector<const Tensor *> &written,
                         const std::vector<const Tensor *> &read) {
    for (const Tensor *const tensor : written) {
        check_written(operation, *tensor);
        for (const Tensor *const other : read) {
            check_apart(*tensor, *other);
        }
    }
    check_all_apart(written);
}

template <Where kWhere>
std::optional<Call<DrawArguments>> draw_arguments(py::handle logits_tensor, py::handle numbers_tensor,
                                                  py::handle integers_tensor, py::handle positions_tensor,
                                                  py::handle bias_tensor, py::handle seen_tensor,
                                                  py::handle ending_tensor, py::handle counts_tensor,
                                                  py::handle mask_index_tensor, py::handle masks_tensor,
                                                  py::handle tokens_tensor) {
    const Tensor logits({"logits"}, logits_tensor);
    const Tensor numbers({"numbers"}, numbers_tensor);
    const Tensor integers({"integers"}, integers_tensor);
    const Tensor positions({"positions"}, positions_tensor);
    const auto bias = optional_tensor({"bias"}, bias_tensor);
    const auto seen = optional_tensor({"seen"}, seen_tensor);
    const auto ending = optional_tensor({"ending"}, ending_tensor);
    const auto counts = optional_tensor({"counts"}, counts_tensor);
    const auto mask_index = optional_tensor({"mask_index"}, mask_index_tensor);
    const auto masks = optional_tensor({"masks"}, masks_tensor);
    const Tensor tokens({"tokens"}, tokens_tensor);

    const ElementType element = element_of_logits("draw", logits);
    const std::int64_t rows = logits.shape[0];
    const std::int64_t vocabulary = logits.shape[1];
    const auto check_table = [&](const Tensor &table, DType dtype, std::int64_t columns, const char *meaning) {
        check(table, dtype, logits.device, {kAny, columns}, meaning);
        check_contiguous(table);
        if (table.shape[0] < rows) {
            refuse(text_of(table.name, " has R=", table.shape[0], " rows, and logits B=", rows,
                           ": R must be at least B."));
        }
    };
    check_table(numbers, DType::kFloat32, kDrawNumbers, "[R, 6]");
    check_table(integers, DType::kInt64, kDrawIntegers, "[R, 4]");
    check(positions, DType::kInt32, logits.device, {rows}, "[B]");
    check(tokens, DType::kInt64, logits.device, {rows}, "[B]");
    check_contiguous(positions);
    check_contiguous(tokens);
    std::vector<const Tensor *> read = {&logits, &numbers, &integers, &positions};
    if (bias) {
        check_table(*bias, DType::kFloat32, vocabulary, "[R, V]");
        read.push_back(&*bias);
    }
    if (seen.has_value() != ending.has_value()) {
        refuse(text_of("one of seen and ending is None: pass both or neither."));
    }
    if (seen) {
        check_table(*seen, DType::kBool, vocabulary, "[R, V]");
        check_table(*ending, DType::kBool, vocabulary, "[R, V]");
        read.push_back(&*ending);
    }
    if (counts) {
        check_table(*counts, DType::kInt32, vocabulary, "[R, V]");
    }
    if (mask_index.has_value() != masks.has_value()) {
        refuse(text_of("one of mask_index and masks is None: pass both or neither."));
    }
    if (masks) {
        check(*mask_index, DType::kInt32, logits.device, {rows}, "[B]");
        check(*masks, DType::kInt32, logits.device, {kAny, kAny}, "[M, W]");
        if (masks->shape[1] < divide_up(vocabulary, kMaskBits)) {
            refuse(text_of("masks has W=", masks->shape[1], " words: they have no bits for all V=", vocabulary,
                           " tokens."));
        }
        check_contiguous(*mask_index);
        check_contiguous(*masks);
        read.push_back(&*mask_index);
        read.push_back(&*masks);
    }
    std::vector<const Tensor *> written = {&tokens};
    if (seen) {
        written.push_back(&*seen);
    }
    if (counts) {
        written.push_back(&*counts);
    }
    check_written_apart("draw", written, read);
    const Launch launch = launch_for(kWhere, logits);
    if (rows == 0) {
        return std::nullopt;
    }
    DrawArguments arguments = {};
    arguments.logits = logits.data;
    arguments.row_bytes = logits.byte_stride(0);
    arguments.element = element;
    arguments.rows = logits.size(0, "B");
    arguments.vocabulary = logits.size(1, "V");
    arguments.numbers = numbers.as<const float>();
    arguments.integers = integers.as<const std::int64_t>();
    arguments.positions = positions.as<const std::int32_t>();
    arguments.bias = data_or_null<const float>(bias);
    arguments.seen = data_or_null<std::uint8_t>(seen);
    arguments.ending = data_or_null<const std::uint8_t>(ending);
    arguments.counts = data_or_null<std::int32_t>(counts);
    arguments.mask_index = data_or_null<const std::int32_t>(mask_index);
    arguments.masks = data_or_null<const std::uint32_t>(masks);
    arguments.mask_count = masks ? masks->size(0, "M") : 0;
    arguments.mask_words = masks ? masks->size(1, "W") : 0;
    arguments.tokens = tokens.as<std::int64_t>();
    return Call<DrawArguments>{arguments, launch, {}};
}

template <Where kWhere>
std::optional<Call<LogprobsArguments>> logprobs_arguments(py::handle logits_tensor, py::handle tokens_tensor,
                                                          py::handle logprobs_tensor, py::handle top_logprobs_tensor,
                                                          py::handle top_tokens_tensor) {
    const Tensor logits({"logits"}, logits_tensor);
    const Tensor tokens({"tokens"}, tokens_tensor);
    const Tensor logprobs({"logprobs"}, logprobs_tensor);
    const Tensor top_logprobs({"top_logprobs"}, top_logprobs_tensor);
    const Tensor top_tokens({"top_tokens"}, top_tokens_tensor);
    const ElementType element = element_of_logits("logprobs", logits);
    const std::int64_t rows = logits.shape[0];
    check(tokens, DType::kInt64, logits.device, {rows}, "[B]");
    check(logprobs, DType::kFloat32, logits.device, {rows}, "[B]");
    check(top_logprobs, DType::kFloat32, logits.device, {rows, kAny}, "[B, K]");
    const std::int64_t likeliest = top_logprobs.shape[1];
    check(top_tokens, DType::kInt64, logits.device, {rows, likeliest}, "[B, K]");
    if (likeliest > logits.shape[1]) {
        refuse(text_of("top_logprobs has K=", likeliest, " columns: logits has only V=", logits.shape[1], " tokens."));
    }
    check_contiguous(tokens);
    const std::vector<const Tensor *> written = {&logprobs, &top_logprobs, &top_tokens};
    for (const Tensor *const tensor : written) {
        check_contiguous(*tensor);
    }
    check_written_apart("logprobs", written, {&logits, &tokens});
    const Launch launch = launch_for(kWhere, logits);
    if (rows == 0) {
        return std::nullopt;
    }
    return Call<LogprobsArguments>{{logits.data, logits.byte_stride(0), element, logits.size(0, "B"),
                                    logits.size(1, "V"), top_logprobs.size(1, "K"), tokens.as<const std::int64_t>(),
                                    logprobs.as<float>(), top_logprobs.as<float>(), top_tokens.as<std::int64_t>()},
                                   launch,
                                   {}};
}

}  // namespace

void bind_sampling(py::module_ &module) {
    const auto define_draw = [&](const char *name, auto function) {
        define(module, name, function, "logits", "numbers", "integers", "positions", "bias", "seen", "ending", "counts",
               "mask_index", "masks", "tokens");
    };
    const auto define_logprobs = [&](const char *name, auto function) {
        define(module, name, function, "logits", "tokens", "logprobs", "top_logprobs", "top_tokens");
    };
    define_logprobs("logprobs_cpu", on_host(logprobs_arguments<Where::kCpu>, logprobs_cpu));
    define_logprobs("logprobs_check", checked(logprobs_arguments<Where::kChecks>));
    define_draw("draw_cpu", on_host(draw_arguments<Where::kCpu>, draw_cpu));
    define_draw("draw_check", checked(draw_arguments<Where::kChecks>));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_draw("draw_cuda", on_gpu(draw_arguments<Where::kCuda>, draw_cuda));
    define_logprobs("logprobs_cuda", on_gpu(logprobs_arguments<Where::kCuda>, logprobs_cuda));
#endif
}

}  // namespace llama_te::bindings
