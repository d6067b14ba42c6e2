// draw on the GPU.

#include "sampling/draw.h"

#include "include/dispatch.h"
#include "sampling/cluster.cuh"
#include "sampling/draw_row.h"

namespace llama_te {

namespace {

template <ElementType kElement>
struct ScaledRow {
    using Read = typename RowOfElements<kElement>::Read;

    RowOfElements<kElement> logits;
    float scale;

    __device__ float at(std::int32_t token) const {
        return rounded_product(logits.at(token), scale);
    }
    __device__ Read read(std::int32_t first) const {
        return logits.read(first);
    }
    __device__ void of(const Read &read, Run &run) const {
        logits.of(read, run);
        for (float &logit : run.logits) {
            logit = rounded_product(logit, scale);
        }
    }
};

template <ElementType kElement>
struct AdjustedRow {
    using Read = typename RowOfElements<kElement>::Read;

    RowOfElements<kElement> logits;
    Adjustment adjustment;
    std::int32_t vocabulary;

    __device__ float at(std::int32_t token) const {
        return adjustment(logits.at(token), adjustment.read(token));
    }
    __device__ Read read(std::int32_t first) const {
        return logits.read(first);
    }
    __device__ void of(const Read &read, Run &run) const {
        // All tables are read before any value is used.
        const auto bias = of_table<std::uint32_t>(adjustment.bias, run.first);
        const auto counts = of_table<std::uint32_t>(adjustment.counts, run.first);
        const auto seen = of_table<std::uint8_t>(adjustment.seen, run.first);
        const auto ending = of_table<std::uint8_t>(adjustment.ending, run.first);
        const std::uint32_t *const allowed = adjustment.allowed;
        const std::uint32_t allowed_tokens = allowed == nullptr ? ~0U : allowed[run.first / 32] >> (run.first % 32);
        logits.of(read, run);
        for (int i = 0; i < kRun; ++i) {
            const bool is_forbidden = ((~allowed_tokens >> i & 1U) | ending[i]) != 0;
            run.logits[i] = adjustment(run.logits[i], {__uint_as_float(bias[i]), static_cast<std::int32_t>(counts[i]),
                                                       seen[i] != 0, is_forbidden});
        }
    }

private:
    // 0 where the row does not need the table.
    template <typename Number, typename Table>
    __device__ RunOf<Number> of_table(const Table *table, std::int32_t first) const {
        static_assert(sizeof(Table) == sizeof(Number));
        return table == nullptr
                   ? RunOf<Number>{}
                   : RunOf<Number>::read(reinterpret_cast<const Number *>(table), first, vocabulary, Number{0});
    }
};

template <ElementType kElement>
__global__ void __launch_bounds__(kClusterThreads, kBlocksOfMultiprocessor) draw_kernel(const __grid_constant__ DrawArguments a) {
    __shared__ ClusterStorage storage;
    Cluster cluster(storage);
    allow_next_kernel();
    wait_for_previous_kernel();
    const std::int32_t row = cluster.row();
    const RowOfElements<kElement> logits(a.logits + row * a.row_bytes, a.vocabulary);
    const Adjustment adjustment = adjustment_of(a, row);
    const Choice choice = choice_of(a, row);
    const std::int64_t token =
        adjustment.only_scales()
            ? draw_row(cluster, ScaledRow<kElement>{logits, adjustment.scale}, choice, a.vocabulary)
            : draw_row(cluster, AdjustedRow<kElement>{logits, adjustment, a.vocabulary}, choice, a.vocabulary);
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
