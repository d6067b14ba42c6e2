// embed, rms_norm, swiglu and greedy, for CUDA alone: on a CPU, PyTorch does their work.

#include "arguments.h"
#include "elementwise/embed.h"
#include "elementwise/rms_norm.h"
#include "elementwise/swiglu.h"
#include "sampling/greedy.h"

namespace llama_te::bindings {

void bind_elementwise([[maybe_unused]] py::module_ &module) {
#ifdef LLAMA_TE_CUDA_ARCHITECTURES
    const auto embed = [](int device, Address stream, Address tokens, Address table, Address output, std::int32_t rows,
                          std::int64_t vocabulary, std::int64_t row_bytes) {
        embed_cuda({pointer<const std::int64_t>(tokens), pointer<const char>(table), pointer<char>(output), rows,
                    vocabulary, row_bytes},
                   device, stream);
    };
    define(module, "embed_cuda", embed, "device", "stream", "tokens", "table", "output", "rows", "vocabulary",
           "row_bytes");

    const auto rms_norm = [](int device, Address stream, Address hidden, Address addend, Address weight, float epsilon,
                             Address output, std::int32_t rows, std::int32_t features) {
        rms_norm_cuda({pointer<char>(hidden), pointer<const char>(addend), pointer<const char>(weight), epsilon,
                       pointer<char>(output), rows, features},
                      device, stream);
    };
    define(module, "rms_norm_cuda", rms_norm, "device", "stream", "hidden", "addend", "weight", "epsilon", "output",
           "rows", "features");

    const auto swiglu = [](int device, Address stream, Address input, Address output, std::int32_t rows,
                           std::int32_t features) {
        swiglu_cuda({pointer<const char>(input), pointer<char>(output), rows, features}, device, stream);
    };
    define(module, "swiglu_cuda", swiglu, "device", "stream", "input", "output", "rows", "features");

    const auto greedy = [](int device, Address stream, Address logits, std::int64_t row_stride, std::int32_t rows,
                           std::int32_t vocabulary, Address tokens, Address lengths, Address best, Address tickets) {
        greedy_cuda({pointer<const char>(logits), row_stride, rows, vocabulary, pointer<std::int64_t>(tokens),
                     pointer<std::int32_t>(lengths), pointer<std::uint64_t>(best), pointer<std::int32_t>(tickets)},
                    device, stream);
    };
    define(module, "greedy_cuda", greedy, "device", "stream", "logits", "row_stride", "rows", "vocabulary", "tokens",
           "lengths", "best", "tickets");
#endif
}

}  // namespace llama_te::bindings
