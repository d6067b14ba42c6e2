// draw on the GPU.

#include "sampling/draw.h"

#include "include/dispatch.h"
#include "sampling/cluster.cuh"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

template <ElementType kElement>
struct ScaledRow {
    static constexpr int kAhead = 4;
    RowOfElements<kElement> logits;
    float scale;

    __device__ float read(std::int32_t token) const {
        return logits.read(token);
    }
    __device__ float of(float logit) const {
        return rounded_product(logit, scale);
    }
};

template <ElementType kElement>
struct AdjustedRow {
    static constexpr int kAhead = 2;
    struct Read {
        float logit;
        Adjustment::Entry entry;
    };

    RowOfElements<kElement> logits;
    Adjustment adjustment;

    __device__ Read read(std::int32_t token) const {
        return {logits.read(token), adjustment.read(token)};
    }
    __device__ float of(const Read &read) const {
        return adjustment(read.logit, read.entry);
    }
};

template <ElementType kElement>
__global__ void __launch_bounds__(kClusterThreads, kBlocksOfMultiprocessor) draw_kernel(const __grid_constant__ DrawArguments a) {
    __shared__ ClusterStorage storage;
    Cluster cluster(storage);
    allow_next_kernel();
    wait_for_previous_kernel();
    const std::int32_t row = cluster.row();
    const RowOfElements<kElement> logits(a.logits + row * a.row_bytes);
    const Adjustment adjustment = adjustment_of(a, row);
    const Choice choice = choice_of(a, row);
    const std::int64_t token =
        adjustment.only_scales()
            ? draw_row(cluster, ScaledRow<kElement>{logits, adjustment.scale}, choice, a.vocabulary)
            : draw_row(cluster, AdjustedRow<kElement>{logits, adjustment}, choice, a.vocabulary);
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
