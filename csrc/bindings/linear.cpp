// linear and its chains. On a CPU PyTorch multiplies, after these checks.
//
// Shapes: B rows, K input features, N output features.

#include "gemv/linear.h"

#include <stdexcept>
#include <vector>

#include "arguments.h"
#include "include/element.h"

namespace llama_te::bindings {

namespace {

// The fields of ops.linear.Product, in its order.
struct ProductFields {
    enum { kInput, kWeight, kOutput, kScale, kNormWeight, kEpsilon, kResidual, kSwiglu, kCount };
};

bool is_fp8(const Tensor &weight) {
    return weight.dtype == DType::kFloat8E4M3;
}

// What the kernel takes, of what PyTorch takes.
void check_for_kernel(const Tensor &input, const Tensor &weight) {
    if (input.dtype != DType::kBFloat16) {
        refuse(text_of(input.name, " is ", input.dtype_name(), ": on a GPU it must be bfloat16."));
    }
    if (input.shape[0] > kMaxLinearRows) {
        refuse(text_of(input.name, " has B=", input.shape[0], " rows: on a GPU allowed are up to ", kMaxLinearRows,
                       ". Split them over more calls."));
    }
    if (weight.empty() || weight.shape[1] * weight.itemsize % kLinearRowBytes != 0 ||
        weight.shape[0] % kLinearOutFeatures != 0) {
        refuse(text_of(weight.name, " is ", weight.dtype_name(), " ", weight.shape_text(),
                       ": on a GPU allowed are bfloat16 and float8_e4m3fn, rows of a multiple of ", kLinearRowBytes,
                       " bytes and N a multiple of ", kLinearOutFeatures, ". Use torch.nn.functional.linear."));
    }
}

struct CheckedProduct {
    Product product;
    Tensor input;
    Tensor weight;
    Tensor output;
};

CheckedProduct product_of(Where where, py::handle item, const char *list, int number) {
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != ProductFields::kCount) {
        throw py::type_error(text_of("products[", number, "] is a ", Py_TYPE(item.ptr())->tp_name,
                                     ": it must be a Product of ops.linear."));
    }
    const auto name = [&](const char *text) { return Name{text, list, number}; };
    const auto field = [&](int place) { return py::handle(PyTuple_GET_ITEM(item.ptr(), place)); };
    const Tensor input(name("input"), field(ProductFields::kInput));
    const Tensor weight(name("weight"), field(ProductFields::kWeight));
    const Tensor output(name("output"), field(ProductFields::kOutput));
    const auto scale = optional_tensor(name("scale"), field(ProductFields::kScale));
    const auto norm_weight = optional_tensor(name("norm_weight"), field(ProductFields::kNormWeight));
    const float epsilon = real(name("epsilon"), field(ProductFields::kEpsilon));
    const auto residual = optional_tensor(name("residual"), field(ProductFields::kResidual));
    const bool swiglu = boolean(name("swiglu"), field(ProductFields::kSwiglu));

    check_floating(input);
    check_like(input, input, {kAny, kAny}, "[B, K]");
    const std::int64_t rows = input.shape[0];
    const std::int64_t in_features = input.shape[1];
    if (!is_fp8(weight) && weight.dtype != input.dtype) {
        refuse(text_of(weight.name, " is ", weight.dtype_name(), "; it must be ", input.dtype_name(),
                       ", as input is, or float8_e4m3fn with a scale."));
    }
    if (is_fp8(weight) && !scale) {
        refuse(text_of(weight.name, " is float8_e4m3fn and scale None: pass the factor of the weight's values."));
    }
    if (!is_fp8(weight) && scale) {
        refuse(text_of(weight.name, " is ", weight.dtype_name(), ": scale belongs to float8_e4m3fn, pass None."));
    }
    check(weight, weight.dtype, input.device, {kAny, in_features}, "[N, K]");
    const std::int64_t out_features = weight.shape[0];
    if (swiglu && out_features % 2 != 0) {
        refuse(text_of(weight.name, " has N=", out_features,
                       " rows: with swiglu half of them are the gate's, so pass even N."));
    }
    if (swiglu && residual) {
        refuse(text_of(residual->name,
                       " is given with swiglu=True: add it to the product behind the activation instead."));
    }
    const std::int64_t columns = swiglu ? out_features / 2 : out_features;
    const char *const meaning = swiglu ? "[B, N / 2]" : "[B, N]";
    check_like(output, input, {rows, columns}, meaning);
    if (scale) {
        check(*scale, DType::kFloat32, input.device, {1}, "[1]");
    }
    if (norm_weight) {
        check_like(*norm_weight, input, {in_features}, "[K]");
    }
    if (residual) {
        check_like(*residual, input, {rows, columns}, meaning);
        check_contiguous(*residual);
    }
    check_contiguous(input);
    check_contiguous(weight);
    check_contiguous(output);
    check_written("linear", output);
    check_apart(input, output);
    check_apart(weight, output);
    if (scale) {
        check_apart(*scale, output);
    }
    if (norm_weight) {
        check_apart(*norm_weight, output);
    }
    if (residual && residual->data != output.data && overlap(*residual, output)) {
        refuse(text_of(residual->name, " and ", output.name,
                       " share memory: residual must be output itself or apart from it."));
    }
    if (where != Where::kCpu) {
        check_for_kernel(input, weight);
        for (const Tensor *const tensor : {&input, &weight, &output}) {
            check_aligned(*tensor);
        }
        for (const auto *const tensor : {&norm_weight, &residual}) {
            if (*tensor) {
                check_aligned(**tensor);
            }
        }
    }
    const Product product = {input.data,
                             weight.data,
                             data_or_null<const float>(scale),
                             data_or_null<const char>(norm_weight),
                             epsilon,
                             data_or_null<const char>(residual),
                             output.data,
                             nullptr,
                             nullptr,
                             input.size(0, "B"),
                             input.size(1, "K"),
                             weight.size(0, "N"),
                             is_fp8(weight) ? WeightType::kFloat8E4M3 : WeightType::kBFloat16,
                             swiglu};
    return {product, input, weight, output};
}

using Products = std::vector<Product>;

template <Where kWhere>
std::optional<Call<Products>> linear_arguments(py::handle list, py::handle partials_tensor,
                                               py::handle semaphores_tensor) {
    if (!PyList_Check(list.ptr()) && !PyTuple_Check(list.ptr())) {
        throw py::type_error(text_of("products is a ", Py_TYPE(list.ptr())->tp_name,
                                     ": it must be a list or a tuple of products."));
    }
    const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(list.ptr()));
    if (items.empty() || items.size() > kMaxProducts) {
        refuse(text_of("products has ", items.size(), " entries: allowed are 1 to ", kMaxProducts,
                       ". Split them over more calls."));
    }
    // A single product is a call of `linear`, whose arguments have their own names.
    const char *const name_of_list = items.size() > 1 ? "products" : nullptr;
    std::vector<CheckedProduct> checked;
    checked.reserve(items.size());
    for (const py::handle item : items) {
        const int number = static_cast<int>(checked.size());
        const auto &[product, input, weight, output] =
            checked.emplace_back(product_of(kWhere, item, name_of_list, number));
        const CheckedProduct &first = checked.front();
        check_like(input, first.input, {kAny, kAny}, "[B, K]");
        if (product.rows != first.product.rows || weight.dtype != first.weight.dtype) {
            refuse(text_of("products[", number, "] has ", product.rows, " rows and a weight of ", weight.dtype_name(),
                           ", products[0] ", first.product.rows, " and ", first.weight.dtype_name(),
                           ": pass products that agree in both."));
        }
    }
    const py::object &device = checked.front().input.device;
    const Launch launch = launch_for(kWhere, checked.front().input);
    const Tensor partials({"workspace.partials"}, partials_tensor);
    const Tensor semaphores({"workspace.semaphores"}, semaphores_tensor);
    for (const Tensor *const tensor : {&partials, &semaphores}) {
        if (!tensor->device.equal(device)) {
            const auto name = [](const py::object &object) { return py::str(object).cast<std::string>(); };
            refuse(text_of(tensor->name, " is on ", name(tensor->device), ": make a LinearWorkspace(", name(device),
                           ")."));
        }
    }
    check(partials, DType::kFloat32, device, {kAny}, "the shape in a LinearWorkspace");
    check(semaphores, DType::kInt32, device, {kAny}, "the shape in a LinearWorkspace");
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    if constexpr (kWhere == Where::kCuda) {
        const auto check_size = [](const Tensor &tensor, std::int64_t needed) {
            if (tensor.shape[0] < needed) {
                refuse(text_of(tensor.name, " has ", tensor.shape[0], " numbers, but ", needed,
                               " are needed: make a LinearWorkspace."));
            }
        };
        check_size(partials, linear_partials(launch.device));
        check_size(semaphores, linear_semaphores(launch.device));
    }
#endif
    check_aligned(partials);
    Products products;
    for (const auto &[product, input, weight, output] : checked) {
        check_apart(output, partials);
        check_apart(output, semaphores);
        products.push_back(product);
        products.back().partials = partials.as<float>();
        products.back().semaphores = semaphores.as<std::int32_t>();
    }
    if (products.front().rows == 0) {
        return std::nullopt;
    }
    return Call<Products>{std::move(products), launch, items};
}

}  // namespace

void bind_linear(py::module_ &module) {
    const auto define_linear = [&](const char *name, auto function) {
        define(module, name, function, "products", "partials", "semaphores");
    };
    define_linear("linear_cpu_check", checked(linear_arguments<Where::kCpu>));
    define_linear("linear_check", checked(linear_arguments<Where::kChecks>));
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    const auto of_device = [](std::int64_t (*size)(int)) {
        return [size](py::handle object) {
            const auto device = static_cast<int>(integer({"device"}, object, 0, INT32_MAX));
            try {
                return size(device);
            } catch (const std::runtime_error &error) {
                refuse(text_of("device=", device, ": ", error.what(), "."));
            }
        };
    };
    define_linear("linear_cuda", on_gpu(linear_arguments<Where::kCuda>, linear_cuda));
    define(module, "linear_partials", of_device(linear_partials), "device");
    define(module, "linear_semaphores", of_device(linear_semaphores), "device");
#endif
}

}  // namespace llama_te::bindings
