// embed, quantize_rows, rms_norm, swiglu and greedy. On a CPU PyTorch does their work, after these checks.
//
// Shapes: B rows, V vocabulary, E hidden size, K features, F features of the activation.

#include <vector>

#include "arguments.h"
#include "elementwise/embed.h"
#include "elementwise/quantize_rows.h"
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

// The matrix has `parts` parts of `columns` columns.
void check_bfloat16_vectors(const Tensor &matrix, const char *columns, int parts = 1) {
    if (matrix.dtype != DType::kBFloat16 || matrix.shape[1] / parts % kVectorElements != 0) {
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

// The scales of an output in FP8, and what multiplies them. Neither is given for other outputs.
struct Scales {
    Scales(py::handle factor_tensor, py::handle scale_tensor)
        : scale(optional_tensor({"scale"}, scale_tensor)), factor(optional_tensor({"factor"}, factor_tensor)) {
    }

    std::optional<Tensor> scale;
    std::optional<Tensor> factor;

    // Checks the output, which has the dtype of `input` or FP8, and adds the tensors of FP8 to those that lie apart.
    void check_with(const char *operation, const Tensor &input, const Tensor &output,
                    std::initializer_list<std::int64_t> shape, const char *meaning,
                    std::vector<const Tensor *> &apart) const {
        if (!scale) {
            if (factor) {
                refuse("factor is given without scale: it multiplies the scales of an output in FP8.");
            }
            check_like(output, input, shape, meaning);
            return;
        }
        check(output, DType::kFloat8E4M3, input.device, shape, meaning);
        check(*scale, DType::kFloat32, input.device, {output.shape[0]}, "[B]");
        check_written(operation, *scale);
        apart.push_back(&*scale);
        if (factor) {
            check(*factor, DType::kFloat32, input.device, {1}, "[1]");
            apart.push_back(&*factor);
        }
    }

    Quantization pointers() const {
        return {data_or_null<const float>(factor), data_or_null<float>(scale)};
    }
};

// Checks the scales of an input's rows, if there are any, and adds them to the tensors that lie apart.
void check_row_scales(const std::optional<Tensor> &scale, const Tensor &input, std::vector<const Tensor *> &apart) {
    if (scale) {
        check(*scale, DType::kFloat32, input.device, {input.shape[0]}, "[B]");
        apart.push_back(&*scale);
    }
}

template <Where kWhere>
std::optional<Call<QuantizeRowsArguments>> quantize_rows_arguments(py::handle input_tensor, py::handle factor_tensor,
                                                                   py::handle output_tensor, py::handle scale_tensor) {
    const Tensor input({"input"}, input_tensor);
    const Tensor output({"output"}, output_tensor);
    if (scale_tensor.is_none()) {
        refuse("scale is None: pass a tensor of float32 [B] for the rows' scales.");
    }
    const Scales scales(factor_tensor, scale_tensor);
    check_floating(input);
    check_like(input, input, {kAny, kAny}, "[B, K]");
    std::vector<const Tensor *> tensors = {&input, &output};
    scales.check_with("quantize_rows", input, output, {input.shape[0], input.shape[1]}, "[B, K]", tensors);
    check_contiguous(input);
    check_contiguous(output);
    check_all_apart(tensors);
    check_no_gradient("quantize_rows", input);
    check_written("quantize_rows", output);
    if constexpr (kWhere != Where::kCpu) {
        check_bfloat16_vectors(input, "K");
        check_aligned(input);
        check_aligned(output);
    }
    const Launch launch = launch_for(kWhere, input);
    if (input.shape[0] == 0) {
        return std::nullopt;
    }
    return Call<QuantizeRowsArguments>{
        {input.data, output.data, scales.pointers(), input.size(0, "B"), input.size(1, "K")}, launch, {}};
}

template <Where kWhere>
std::optional<Call<RmsNormArguments>> rms_norm_arguments(py::handle hidden_tensor, py::handle weight_tensor,
                                                         py::handle epsilon_number, py::handle addend_tensor,
                                                         py::handle addend_scale_tensor, py::handle factor_tensor,
                                                         py::handle output_tensor, py::handle scale_tensor) {
    const Tensor hidden({"hidden"}, hidden_tensor);
    const Tensor weight({"weight"}, weight_tensor);
    const float epsilon = real({"epsilon"}, epsilon_number);
    const Tensor output({"output"}, output_tensor);
    check_floating(hidden);
    check_like(hidden, hidden, {kAny, kAny}, "[B, K]");
    const std::int64_t rows = hidden.shape[0];
    const std::int64_t features = hidden.shape[1];
    check_like(weight, hidden, {features}, "[K]");
    const Scales scales(factor_tensor, scale_tensor);
    std::vector<const Tensor *> matrices = {&hidden, &output};
    std::vector<const Tensor *> apart = {&weight};
    scales.check_with("rms_norm", hidden, output, {rows, features}, "[B, K]", apart);
    const auto addend = optional_tensor({"addend"}, addend_tensor);
    const auto addend_scale = optional_tensor({"addend_scale"}, addend_scale_tensor);
    if (addend) {
        check_like(*addend, hidden, {rows, features}, "[B, K]");
        matrices.push_back(&*addend);
    } else if (addend_scale) {
        refuse("addend_scale is given without addend, whose rows it multiplies.");
    }
    check_row_scales(addend_scale, hidden, apart);
    for (const Tensor *const matrix : matrices) {
        check_contiguous(*matrix);
    }
    apart.insert(apart.end(), matrices.begin(), matrices.end());
    check_all_apart(apart);
    check_written("rms_norm", hidden);
    check_written("rms_norm", output);
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
    return Call<RmsNormArguments>{{hidden.data, data_or_null<const char>(addend),
                                   data_or_null<const float>(addend_scale), weight.data, epsilon, output.data,
                                   scales.pointers(), hidden.size(0, "B"), hidden.size(1, "K")},
                                  launch,
                                  {}};
}

template <Where kWhere>
std::optional<Call<SwigluArguments>> swiglu_arguments(py::handle input_tensor, py::handle input_scale_tensor,
                                                      py::handle factor_tensor, py::handle output_tensor,
                                                      py::handle scale_tensor) {
    const Tensor input({"input"}, input_tensor);
    const Tensor output({"output"}, output_tensor);
    check_floating(input);
    check_like(input, input, {kAny, kAny}, "[B, 2 F]");
    if (input.shape[1] % 2 != 0) {
        refuse(text_of("input has ", input.shape[1],
                       " columns: half of them are the gate's, so pass an even number."));
    }
    const Scales scales(factor_tensor, scale_tensor);
    std::vector<const Tensor *> apart = {&input, &output};
    scales.check_with("swiglu", input, output, {input.shape[0], input.shape[1] / 2}, "[B, F]", apart);
    const auto input_scale = optional_tensor({"input_scale"}, input_scale_tensor);
    check_row_scales(input_scale, input, apart);
    check_contiguous(input);
    check_contiguous(output);
    check_all_apart(apart);
    check_no_gradient("swiglu", input);
    check_written("swiglu", output);
    if constexpr (kWhere != Where::kCpu) {
        check_bfloat16_vectors(input, "F", 2);
        check_aligned(input);
        check_aligned(output);
    }
    const Launch launch = launch_for(kWhere, input);
    if (output.empty()) {
        return std::nullopt;
    }
    input.size(1, "2 F");
    return Call<SwigluArguments>{
        {input.data, data_or_null<const float>(input_scale), output.data, scales.pointers(), output.size(0, "B"),
         output.size(1, "F")},
        launch,
        {}};
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
    const auto lengths = optional_tensor({"lengths"}, lengths_tensor);
    if (lengths) {
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
                                  tokens.as<std::int64_t>(), data_or_null<std::int32_t>(lengths),
                                  best.as<std::uint64_t>(), tickets.as<std::int32_t>()},
                                 launch,
                                 {}};
}

}  // namespace

void bind_elementwise(py::module_ &module) {
    const auto define_embed = [&](const char *name, auto function) {
        define(module, name, function, "tokens", "table", "output");
    };
    const auto define_quantize_rows = [&](const char *name, auto function) {
        define(module, name, function, "input", "factor", "output", "scale");
    };
    const auto define_rms_norm = [&](const char *name, auto function) {
        define(module, name, function, "hidden", "weight", "epsilon", "addend", "addend_scale", "factor", "output",
               "scale");
    };
    const auto define_swiglu = [&](const char *name, auto function) {
        define(module, name, function, "input", "input_scale", "factor", "output", "scale");
    };
    const auto define_greedy = [&](const char *name, auto function) {
        define(module, name, function, "logits", "tokens", "lengths", "best", "tickets");
    };
    define_embed("embed_cpu_check", checked(embed_arguments<Where::kCpu>));
    define_embed("embed_check", checked(embed_arguments<Where::kChecks>));
    define_quantize_rows("quantize_rows_cpu_check", checked(quantize_rows_arguments<Where::kCpu>));
    define_quantize_rows("quantize_rows_check", checked(quantize_rows_arguments<Where::kChecks>));
    define_rms_norm("rms_norm_cpu_check", checked(rms_norm_arguments<Where::kCpu>));
    define_rms_norm("rms_norm_check", checked(rms_norm_arguments<Where::kChecks>));
    define_swiglu("swiglu_cpu_check", checked(swiglu_arguments<Where::kCpu>));
    define_swiglu("swiglu_check", checked(swiglu_arguments<Where::kChecks>));
    define_greedy("greedy_cpu_check", checked(greedy_arguments<Where::kCpu>));
    define_greedy("greedy_check", checked(greedy_arguments<Where::kChecks>));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    define_embed("embed_cuda", on_gpu(embed_arguments<Where::kCuda>, embed_cuda));
    define_quantize_rows("quantize_rows_cuda", on_gpu(quantize_rows_arguments<Where::kCuda>, quantize_rows_cuda));
    define_rms_norm("rms_norm_cuda", on_gpu(rms_norm_arguments<Where::kCuda>, rms_norm_cuda));
    define_swiglu("swiglu_cuda", on_gpu(swiglu_arguments<Where::kCuda>, swiglu_cuda));
    define_greedy("greedy_cuda", on_gpu(greedy_arguments<Where::kCuda>, greedy_cuda));
#endif
}

}  // namespace llama_te::bindings
