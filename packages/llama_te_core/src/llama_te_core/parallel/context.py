"""Context parallelism: processes share the tokens of each sequence.

`apply_context_parallel` splits the layers, and `shard_context` the batches.

Shapes: B sequences, S columns of a padded batch, T packed tokens, L tokens (or columns) of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..data.labels import IGNORED_LABEL, next_token_labels
from ..layers.sequence_layout import token_places, whole_places
from ..models.causal_lm import NVLlamaForCausalLM
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
    model.model.context_ranks = context.size()


def shard_context(batch: Mapping[str, Any], mesh: DeviceMesh | None) -> dict[str, Any]:
    """Return this process's part of a batch, and the divisor that makes losses the mean over all tokens of the mesh.

    `whole_places` says which tokens of a sequence a context rank gets. The function shifts labels before it splits
    them. `num_items_in_batch` is the number of labels of the whole mesh divided by the number of processes with
    different tokens. The losses of these processes then average to the mean over all labels. So do their gradients,
    which FSDP and DDP average.

    Args:
        batch: The model's arguments: `input_ids` [B, S] with `attention_mask` [B, S], or packed, [1, T], with
            `cu_seq_lens_q`; `labels` or `shift_labels` of the same shape. The function splits other tensors that begin
            with this shape in the same way. All processes with one place in `replicate` and `shard` need the same
            batch.
        mesh: The result of `make_mesh`; `None` for one process.

    Returns:
        The model's arguments. With several context ranks each has about 1/context of the tokens, and there is no mask:
        each row begins with its tokens, and the padding after them counts as part of the sequence, to which no token
        attends.

    Raises:
        ValueError: The ranks cannot share sequences equally, or `cu_seq_lens_q` is missing for packed sequences.
    """
    part = dict(batch)
    labels = part.pop("labels", None)
    if labels is not None and part.get("shift_labels") is None:
        part["shift_labels"] = next_token_labels(labels, part.get("attention_mask"))
    if mesh is not None and mesh["context"].size() > 1:
        cut = _cut_padded if part.get("cu_seq_lens_q") is None else _cut_packed
        part = cut(part, mesh.get_local_rank("context"), mesh["context"].size())
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


def _cut_packed(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    packed = {name: batch.pop(name) for name in list(batch) if name.startswith(("cu_seq_lens", "max_length"))}
    batch.pop("pad_between_seqs", None)
    batch.pop("position_ids", None)  # they follow from the sequences
    # Padding within a sequence counts as its end, where causality hides it.
    offsets = packed.get("cu_seq_lens_q_padded")
    offsets = packed["cu_seq_lens_q"] if offsets is None else offsets
    # Reading the lengths is free on the host. On a GPU it would wait for the device, so there is no check there.
    if offsets.device.type == "cpu" and bool((offsets % (2 * ranks)).any()):
        raise ValueError(
            f"sequences of {offsets.diff().tolist()} tokens cannot be shared out over context={ranks} ranks: make each "
            f"a multiple of {2 * ranks} (DataCollatorWithFlattening(pad_sequences_to_be_divisible_by={2 * ranks}))."
        )
    part_offsets = offsets // ranks
    row_L, place_L = token_places(part_offsets, batch["input_ids"].shape[1] // ranks)
    source_L = offsets[row_L] + whole_places(place_L, part_offsets.diff()[row_L], rank, ranks)
    part = _select(batch, source_L)
    part["cu_seq_lens_q"] = part["cu_seq_lens_k"] = part_offsets
    if packed.get("max_length_q") is not None:
        part["max_length_q"] = part["max_length_k"] = -(-packed["max_length_q"] // ranks)
    return part


def _cut_padded(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    mask_BS = batch.pop("attention_mask", None)
    rows, width = batch["input_ids"].shape
    if batch.pop("position_ids", None) is not None and mask_BS is None and rows == 1:
        raise ValueError(
            "position_ids may mean that the row is packed, and context parallelism must know: pass cu_seq_lens_q for "
            "packed sequences, or leave position_ids out."
        )
    if mask_BS is not None:
        order_BS = torch.argsort(mask_BS == 0, dim=1, stable=True)
        row_B1 = torch.arange(rows, device=order_BS.device)[:, None]
        batch = {
            name: value[row_B1, order_BS] if _is_per_token(value, rows, width) else value
            for name, value in batch.items()
        }
    missing = -width % (2 * ranks)
    if missing:
        for name, value in batch.items():
            if _is_per_token(value, rows, width):
                filling = IGNORED_LABEL if name == "shift_labels" else 0
                batch[name] = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=filling)
    place_L = torch.arange((width + missing) // ranks, device=batch["input_ids"].device)
    return _select(batch, whole_places(place_L, len(place_L), rank, ranks))


def _select(batch: dict[str, Any], source_L: torch.Tensor) -> dict[str, Any]:
    rows, width = batch["input_ids"].shape
    return {
        name: value[:, source_L.to(value.device)] if _is_per_token(value, rows, width) else value
        for name, value in batch.items()
    }


def _is_per_token(value: Any, rows: int, width: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (rows, width)
