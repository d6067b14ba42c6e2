"""Context parallelism: processes share the tokens of each sequence.

`apply_context_parallel` splits the layers, and `shard_context` the batches.

Shapes: B sequences, S columns of a padded batch, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..data.labels import IGNORED_LABEL, next_token_labels
from ..models.causal_lm import NVLlamaForCausalLM
from .context_batches import context_part
from .sizes import ContextKind

# Processes along these dimensions of the mesh have different tokens.
_TOKEN_DIMENSIONS = ("replicate", "shard", "context")


def apply_context_parallel(model: NVLlamaForCausalLM, mesh: DeviceMesh, kind: ContextKind) -> None:
    """Let a model's layers take this process's part of each sequence.

    Args:
        model: The function changes it.
        mesh: The result of `make_mesh`.
        kind: The exchange of keys and values between ranks; see `parallelize`.

    Raises:
        ValueError: The kind does not fit the number of heads.
    """
    context = mesh["context"]
    heads = model.config.num_key_value_heads // mesh["tensor"].size()
    model.layer_backend.split_context(list(model.model.layers), context, kind, heads)


def shard_context(batch: Mapping[str, Any], mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return this process's part of a batch, and the divisor that makes losses the mean over all tokens of the mesh.

    The function shifts labels before it splits them. `num_items_in_batch` is the number of labels of the whole mesh
    divided by the number of processes with different tokens. The losses of these processes then average to the mean
    over all labels. So do their gradients, which FSDP and DDP average.

    Args:
        batch: The model's arguments: `input_ids` [B, S] with `attention_mask` [B, S], or packed, [1, T], with
            `cu_seq_lens_q`; `labels` or `shift_labels` of the same shape. The function splits other tensors that begin
            with this shape in the same way. All processes with one place in `replicate` and `shard` need the same
            batch.
        mesh: The result of `make_mesh`; `None` for one process.

    Returns:
        The model's arguments; see `context_part`.

    Raises:
        ValueError: The ranks cannot share sequences equally, or `cu_seq_lens_q` is missing for packed sequences.
    """
    part = dict(batch)
    labels = part.pop("labels", None)
    if labels is not None and part.get("shift_labels") is None:
        part["shift_labels"] = next_token_labels(labels, part.get("attention_mask"))
    if mesh is not None and mesh["context"].size() > 1:
        part = context_part(part, mesh.get_local_rank("context"), mesh["context"].size())
    if part.get("shift_labels") is not None:
        count = (part["shift_labels"] != IGNORED_LABEL).sum()
        part["num_items_in_batch"] = count if mesh is None else _mean_over_processes(count, mesh)
    return part


def _mean_over_processes(count: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    count = count.to(mesh.device_type)
    processes = 1
    for dimension in _TOKEN_DIMENSIONS:
        processes *= mesh[dimension].size()
        if mesh[dimension].size() > 1:
            dist.all_reduce(count, group=mesh.get_group(dimension))
    return count / processes
