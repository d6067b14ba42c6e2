// draw on the GPU.

#include "sampling/draw.h"

#include "include/dispatch.h"
#include "sampling/cluster.cuh"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

template <ElementType kElement>
__global__ void __launch_bounds__(kClusterThreads, 2) draw_kernel(const __grid_constant__ DrawArguments a) {
    __shared__ ClusterStorage storage;
    allow_next_kernel();
    wait_for_previous_kernel();
    Cluster cluster(storage);
    const std::int32_t row = cluster.row();
    const char *const logits = a.logits + row * a.row_bytes;
    const Adjustment adjusted = adjustment_of(a, row);
    const auto logit_of = [&](std::int32_t token) { return adjusted(logit_at<kElement>(logits, token), token); };
    const std::int64_t token = draw_row(cluster, logit_of, choice_of(a, row), a.vocabulary);
    if (cluster.is_first()) {
        a.tokens[row] = token;
        record(a, row, token);
    }
    cluster.finish();
}

}  // namespace

void draw_cuda(const DrawArguments &arguments, int device, std::uintptr_t stream) {
    dispatch("draw", Elements{}, arguments.element, [&](auto element) {
        launch_clusters(draw_kernel<decltype(element)::value>, arguments.rows, device, stream, "draw", arguments);
    });
}

}  // namespace llama_te
