#!/bin/bash
# Trains on several hosts. Run it on each of them, with the same arguments:
#
#   NODES=4 HEAD=host-0 GPUS=8 examples/train_torchrun.sh --config llama-3.1-8b \
#       --data.source /data/texts --data.tokenizer /data/llama --folder /data/run
#
# All hosts must see the run's folder. After a stop, the same commands go on from the last checkpoint.
set -euo pipefail

# torchrun gives its processes so many seconds to save a checkpoint when it is told to end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

exec torchrun \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id llama-te \
    -m llama_te_core.train "$@"
