// embed, rms_norm, swiglu and greedy. On a CPU PyTorch does their work, after these checks.
//
// Shapes: B rows, V vocabulary, E hidden size, K features, F features of the activation.

#include <vector>

#include "arguments.h"
#include "elementwise/embed.h"
#include "elementwise/rms_norm.h"
#include "elementwise/swiglu.h"
#include "include/element.h"
#include "sampling/greedy.h"

namespace llama_te::bindings {

namespace {

constexpr int kVectorElements = kVectorBytes / 2;  // of bfloat16

void check_grid_rows(const Tensor &tensor) {
    if (tensor.shape[0] > kMaxGridRows) {
        refuse(text_of(tensor.name, " has B=", tensor.shape[0], " rows: on a GPU allowed are up to ", kMaxGridRows,
                       ". Split them over more calls."));
    }
}

void check_bfloat16_vectors(const Tensor &matrix, const char *columns) {
    if (matrix.dtype != DType::kBFloat16 || matrix.shape[1] % kVectorElements != 0) {
        refuse(text_of(matrix.name, " is ", matrix.dtype_name(), " ", matrix.shape_text(),
                       ": on a GPU allowed are bfloat16 and ", columns, " a multiple of ", kVectorElements, "."));
    }
}

template <Where kWhere>
std::optional<Call<EmbedArguments>> embed_arguments(py::handle tokens_tensor, py::handle table_tensor,
                                                    py::handle output_tensor) {
    const Tensor tokens({"tokens"}, tokens_tensor);
    const Tensor table({"table"}, table_tensor);
    const Tensor output({"output"}, output_tensor);
    check_floating(table);
    check(tokens, DType::kInt64, table.device, {kAny}, "[B]");
    check_like(table, table, {kAny, kAny}, "[V, E]");
    check_like(output, table, {tokens.shape[0], table.shape[1]}, "[B, E]");
    check_contiguous(table);
    check_contiguous(output);
    check_all_apart({&tokens, &table, &output});
    check_written("embed", output);
    const std::int64_t row_bytes = table.shape[1] * table.itemsize;
    if constexpr (kWhere != Where::kCpu) {
        if (row_bytes % kVectorBytes != 0) {
            refuse(text_of("table has rows of ", row_bytes, " bytes: on a GPU allowed are multiples of ", kVectorBytes,
                           "."));
        }
        check_aligned(table);
        check_aligned(output);
        check_grid_rows(tokens);
    }
    const Launch launch = launch_for(kWhere, table);
    if (output.empty()) {
        return std::nullopt;
    }
    return Call<EmbedArguments>{{tokens.as<const std::int64_t>(), table.data, output.data, tokens.size(0, "B"),
                                 table.shape[0], row_bytes},
                                launch,
                                {}};
}

template <Where kWhere>
std::optional<Call<RmsNormArguments>> rms_norm_arguments(py::handle hidden_tensor, py::handle weight_tensor,
                                                         py::handle epsilon_number, py::handle addend_tensor,
                                                         py::handle output_tensor) {
    const Tensor hidden({"hidden"}, hidden_tensor);
    const Tensor weight({"weight"}, weight_tensor);
    const float epsilon = real({"epsilon"}, epsilon_number);
    const Tensor output({"output"}, output_tensor);
    check_floating(hidden);
    check_like(hidden, hidden, {kAny, kAny}, "[B, K]");
    const std::int64_t rows = hidden.shape[0];
    const std::int64_t features = hidden.shape[1];
    check_like(weight, hidden, {features}, "[K]");
    check_like(output, hidden, {rows, features}, "[B, K]");
    std::vector<const Tensor *> matrices = {&hidden, &output};
    std::optional<Tensor> addend;
    if (!addend_tensor.is_none()) {
        addend.emplace(Name{"addend"}, addend_tensor);
        check_like(*addend, hidden, {rows, features}, "[B, K]");
        matrices.push_back(&*addend);
    }
    for (const Tensor *const matrix : matrices) {
        check_contiguous(*matrix);
    }
    check_all_apart(matrices);
    check_written("rms_norm", hidden);
    check_written("rms_norm", output);
    check_apart(weight, hidden);
    check_apart(weight, output);
    if constexpr (kWhere != Where::kCpu) {
        check_bfloat16_vectors(hidden, "K");
        check_aligned(weight);
        for (const Tensor *const matrix : matrices) {
            check_aligned(*matrix);
        }
    }
    const Launch launch = launch_for(kWhere, hidden);
    if (hidden.empty()) {
        return std::nullopt;
    }
    return Call<RmsNormArguments>{{hidden.data, addend ? addend->data : nullptr, weight.data, epsilon, output.data,
                                   hidden.size(0, "B"), hidden.size(1, "K")},
                                  launch,
                                  {}};
}

template <Where kWhere>
std::optional<Call<SwigluArguments>> swiglu_arguments(py::handle input_tensor, py::handle output_tensor) {
    const Tensor input({"input"}, input_tensor);
    const Tensor output({"output"}, output_tensor);
    check_floating(input);
    check_like(input, input, {kAny, kAny}, "[B, 2 F]");
    if (input.shape[1] % 2 != 0) {
        refuse(text_of("input has ", input.shape[1],
                       " columns: half of them are the gate's, so pass an even number."));
    }
    check_like(output, input, {input.shape[0], input.shape[1] / 2}, "[B, F]");
    check_contiguous(input);
    check_contiguous(output);
    check_apart(input, output);
    check_no_gradient("swiglu", input);
    check_written("swiglu", output);
    if constexpr (kWhere != Where::kCpu) {
        check_bfloat16_vectors(output, "F");
        check_aligned(input);
        check_aligned(output);
    }
    const Launch launch = launch_for(kWhere, input);
    if (output.empty()) {
        return std::nullopt;
    }
    input.size(1, "2 F");
    return Call<SwigluArguments>{{input.data, output.data, output.size(0, "B"), output.size(1, "F")}, launch, {}};
}

template <Where kWhere>
std::optional<Call<GreedyArguments>> greedy_arguments(py::handle logits_tensor, py::handle tokens_tensor,
                                                      py::handle lengths_tensor, py::handle best_tensor,
                                                      py::handle tickets_tensor) {
    const Tensor logits({"logits"}, logits_tensor);
    const Tensor tokens({"tokens"}, tokens_tensor);
    const Tensor best({"best"}, best_tensor);
    const Tensor tickets({"tickets"}, tickets_tensor);
    check_floating(logits);
    check_like(logits, logits, {kAny, kAny}, "[B, V]");
    const std::int64_t rows = logits.shape[0];
    if (logits.shape[1] == 0) {
        refuse(text_of("logits has the shape ", logits.shape_text(), ": there must be a token to take."));
    }
    check(tokens, DType::kInt64, logits.device, {rows}, "[B]");
    std::vector<const Tensor *> tensors = {&logits, &tokens, &best, &tickets};
    std::optional<Tensor> lengths;
    if (!lengths_tensor.is_none()) {
        lengths.emplace(Name{"lengths"}, lengths_tensor);
        check(*lengths, DType::kInt32, logits.device, {rows}, "[B]");
        tensors.push_back(&*lengths);
    }
    check(best, DType::kInt64, logits.device, {rows}, "[B]");
    check(tickets, DType::kInt32, logits.device, {rows}, "[B]");
    check_all_apart(tensors);
    if constexpr (kWhere != Where::kCpu) {
        if (logits.dtype != DType::kBFloat16 || logits.shape[1] % kVectorElements != 0 ||
            logits.byte_stride(0) % kVectorBytes != 0) {
            refuse(text_of("logits is ", logits.dtype_name(), " ", logits.shape_text(), " with the strides ",
                           logits.strides_text(), ": on a GPU allowed are bfloat16, and V and the rows' stride ",
                           "multiples of ", kVectorElements, "."));
        }
        check_aligned(logits);
        check_grid_rows(logits);
    }
    const Launch launch = launch_for(kWhere, logits);
    if (rows == 0) {
        return std::nullopt;
    }
    return Call<GreedyArguments>{{logits.data, logits.byte_stride(0), logits.size(0, "B"), logits.size(1, "V"),
                                  tokens.as<std::int64_t>(), lengths ? lengths->as<std::int32_t>() : nullptr,
                                  best.as<std::uint64_t>(), tickets.as<std::int32_t>()},
                                 launch,
                                 {}};
}

}  // namespace

void bind_elementwise(py::module_ &module) {
    const auto define_embed = [&](const char *name, auto function) {
        define(module, name, function, "tokens", "table", "output");
    };
    const auto define_rms_norm = [&](const char *name, auto function) {
        define(module, name, function, "hidden", "weight", "epsilon", "addend", "output");
    };
    const auto define_swiglu = [&](const char *name, auto function) {
        define(module, name, function, "input", "output");
    };
    const auto define_greedy = [&](const char *name, auto function) {
        define(module, name, function, "logits", "tokens", "lengths", "best", "tickets");
    };
    define_embed("embed_cpu_check", checked(embed_arguments<Where::kCpu>));
    define_embed("embed_check", checked(embed_arguments<Where::kChecks>));
    define_rms_norm("rms_norm_cpu_check", checked(rms_norm_arguments<Where::kCpu>));
    define_rms_norm("rms_norm_check", checked(rms_norm_arguments<Where::kChecks>));
    define_swiglu("swiglu_cpu_check", checked(swiglu_arguments<Where::kCpu>));
    define_swiglu("swiglu_check", checked(swiglu_arguments<Where::kChecks>));
    define_greedy("greedy_cpu_check", checked(greedy_arguments<Where::kCpu>));
    define_greedy("greedy_check", checked(greedy_arguments<Where::kChecks>));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_embed("embed_cuda", on_gpu(embed_arguments<Where::kCuda>, embed_cuda));
    define_rms_norm("rms_norm_cuda", on_gpu(rms_norm_arguments<Where::kCuda>, rms_norm_cuda));
    define_swiglu("swiglu_cuda", on_gpu(swiglu_arguments<Where::kCuda>, swiglu_cuda));
    define_greedy("greedy_cuda", on_gpu(greedy_arguments<Where::kCuda>, greedy_cuda));
#endif
}

}  // namespace llama_te::bindings
