// logprobs on the GPU.

#include "sampling/logprobs.h"

#include "include/dispatch.h"
#include "sampling/cluster.cuh"
#include "sampling/logprobs_row.h"

namespace llama_te {

namespace {

template <ElementType kElement>
__global__ void __launch_bounds__(kClusterThreads, kBlocksOfMultiprocessor) logprobs_kernel(const __grid_constant__ LogprobsArguments a) {
    __shared__ ClusterStorage storage;
    Cluster cluster(storage);
    allow_next_kernel();
    wait_for_previous_kernel();
    const std::int32_t row = cluster.row();
    logprobs_row(cluster, RowOfElements<kElement>(a.logits + row * a.row_bytes, a.vocabulary), a, row);
    cluster.finish();
}

}  // namespace

void logprobs_cuda(const LogprobsArguments &arguments, int device, std::uintptr_t stream) {
    dispatch("logprobs", Elements{}, arguments.element, [&](auto element) {
        launch_clusters(logprobs_kernel<decltype(element)::value>, arguments.rows, device, stream, "logprobs",
                        arguments);
    });
}

}  // namespace llama_te
