// linear and its chains, for CUDA alone: on a CPU, PyTorch multiplies.

#include <tuple>
#include <vector>

#include "arguments.h"
#include "gemv/linear.h"

namespace llama_te::bindings {

void bind_linear([[maybe_unused]] py::module_ &module) {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    // Input, weight, output, scale, norm weight, epsilon, residual, swiglu, input features, output features. A tuple
    // costs less per call than named arguments.
    using Entry = std::tuple<Address, Address, Address, Address, Address, float, Address, bool, std::int32_t,
                             std::int32_t>;
    const auto launch = [](int device, Address stream, std::int32_t rows, int weight_type, Address partials,
                           Address tickets, const std::vector<Entry> &entries) {
        std::vector<Product> products;
        products.reserve(entries.size());
        for (const auto &[input, weight, output, scale, norm_weight, epsilon, residual, swiglu, in_features,
                          out_features] : entries) {
            products.push_back({pointer<const char>(input), pointer<const char>(weight), pointer<const float>(scale),
                                pointer<const char>(norm_weight), epsilon, pointer<const char>(residual),
                                pointer<char>(output), pointer<float>(partials), pointer<std::int32_t>(tickets), rows,
                                in_features, out_features, static_cast<WeightType>(weight_type), swiglu});
        }
        linear_cuda(products, device, stream);
    };
    define(module, "linear_cuda", launch, "device", "stream", "rows", "weight_type", "partials", "tickets",
           "products");
    define(module, "linear_partials", &linear_partials, "device");
    define(module, "linear_semaphores", &linear_semaphores, "device");
#endif
}

}  // namespace llama_te::bindings
