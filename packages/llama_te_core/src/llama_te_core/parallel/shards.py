"""Tensors that processes share: the whole tensor, this process's part, and the form for checkpoints.

A process's rows of `fc1_weight`, and of its optimizer state, come from both halves of the whole tensor. torch's
checkpoint format supports ranges only, so these tensors need `gather_halves` and `scatter_halves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from ..compat.torch import local_range, placement_of_two_halves, tree_map

# Each process has its share of both halves of the tensor's rows: `fc1_weight` holds the gate, then the up projection.
TWO_HALVES = placement_of_two_halves()


def is_interleaved(tensor: Any) -> bool:
    """Tell whether each process has rows of both halves of a tensor: `fc1_weight` and its optimizer state."""
    return isinstance(tensor, DTensor) and tensor.placements[-1] == TWO_HALVES


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor that processes share. All processes must call this; a plain tensor is already whole."""
    tensor = gather_halves(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: torch.Tensor, like: DTensor) -> torch.Tensor:
    """Return this process's part of a whole tensor, split like another tensor. Processes do not communicate.

    Args:
        tensor: The whole tensor.
        like: A tensor of the same shape, which the processes share.

    Returns:
        A view of the tensor if the part is one range of each dimension, otherwise a copy.
    """
    mesh, placements = like.device_mesh, list(like.placements)
    if is_interleaved(like):
        tensor = _own_halves(tensor, mesh)
        placements[-1] = Replicate()  # the rest of the mesh splits these rows
    sizes, offsets = local_range(tensor, like, placements)
    for dimension, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dimension, offset, size)
    return tensor


def gather_halves(state: Any) -> Any:
    """Return a state dict that torch.distributed.checkpoint can save and load, from any mesh.

    The function gathers tensors whose parts are no single range (see the head of this module) over the tensor ranks.
    All others stay as they are. Save the result. To load, let torch load into the result, and then call
    `scatter_halves`. All processes must call this.

    Args:
        state: Nested dicts and lists with the tensors of a model, of an optimizer, or of both.

    Returns:
        The same nested structure with the gathered tensors.
    """

    def gather(value: Any) -> Any:
        if not is_interleaved(value):
            return value
        part = value.to_local().detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(value.device_mesh.shape[-1])]
        dist.all_gather(parts, part, value.device_mesh.get_group(-1))
        whole = torch.cat([half for halves in zip(*(part.chunk(2) for part in parts), strict=True) for half in halves])
        return _place(whole, value, [*value.placements[:-1], Replicate()])

    return tree_map(gather, state)


def scatter_halves(state: Any, like: Any) -> Any:
    """Undo `gather_halves` after loading.

    Args:
        state: The result of `gather_halves(like)`, with loaded values.
        like: The argument of `gather_halves`.

    Returns:
        `state` with the placements of `like`.
    """

    def scatter(value: Any, original: Any) -> Any:
        if not is_interleaved(original):
            return value
        return _place(_own_halves(value.to_local(), original.device_mesh), original, original.placements)

    return tree_map(scatter, state, like)


def _own_halves(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Return the tensor rank's rows of both halves."""
    rank, ranks = mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1]
    return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])


def _place(part: torch.Tensor, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    # `redistribute` would not do: some versions of torch refuse it for this kind of placement.
    return DTensor.from_local(part, like.device_mesh, placements, shape=like.shape, stride=like.stride())
