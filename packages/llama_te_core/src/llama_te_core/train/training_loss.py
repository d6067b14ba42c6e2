"""The loss of a model in training, without the logits.

Shapes: B sequences, S columns of a padded batch (packed: B = 1), E hidden size, V vocabulary (with tensor parallelism,
this process's part).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..layers.collectives import local
from ..loss.linear_cross_entropy import linear_cross_entropy
from ..models.causal_lm import NVLlamaForCausalLM


def return_loss_alone(
    model: NVLlamaForCausalLM, mesh: DeviceMesh | None, *, z_loss: float = 0.0, chunk_tokens: int = 2048
) -> None:
    """Make a model's forward pass return the loss of a batch, from `linear_cross_entropy`.

    Forward passes are replaced rather than gone around: FSDP and DDP do their work around the call of a module. The
    model's takes what `shard_context` returns, and returns a float32 [].

    Args:
        model: It is changed, before or after `parallelize`. Saving it is not concerned.
        mesh: What it is or will be split over.
        z_loss: See `linear_cross_entropy`.
        chunk_tokens: See there.
    """
    tensor_mesh = mesh["tensor"] if mesh is not None and mesh["tensor"].size() > 1 else None

    def loss_of(hidden_BSE: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            hidden_BSE,
            local(model.lm_head.weight, tensor_mesh),
            shift_labels,
            num_items=num_items_in_batch,
            z_loss=z_loss,
            chunk_tokens=chunk_tokens,
            vocabulary_group=None if tensor_mesh is None else tensor_mesh.get_group(),
        )

    head: Any = loss_of
    if tensor_mesh is None:
        # FSDP gathers the head's weight around the call of the module. (Tensor parallelism has other plans for it.)
        head = model.lm_head
        head.forward = loss_of

    def forward(*, shift_labels: torch.Tensor, num_items_in_batch: torch.Tensor, **batch: Any) -> torch.Tensor:
        return head(model.model(**batch).last_hidden_state, shift_labels, num_items_in_batch)

    model.forward = forward
