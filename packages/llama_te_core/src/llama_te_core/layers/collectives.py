"""What a layer that is split over processes exchanges, as functions that autograd knows.

Each takes the mesh of the processes, of one dimension, or `None` for a layer that is not split: then nothing happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# How Transformer Engine's layers bring queries together with the keys of other context ranks, in the words of its
# `cp_comm_type`: keys and values go round a ring, are gathered, or heads are exchanged for tokens.
ContextKind = Literal["p2p", "all_gather", "a2a"]


def local(weight: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The part of a distributed weight that this process computes with."""
    if mesh is None:
        return weight
    assert isinstance(weight, DTensor)
    return weight.to_local()


def local_norm(weight: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """The same of a norm's weight, which all have: its gradient is summed where each has tokens of its own.

    Args:
        weight: The norm's weight.
        mesh: The processes.
        placement: Of the tokens: `Replicate()`, all have them, or `Shard(0)`.
    """
    own = local(weight, mesh)
    return shared(own, mesh, Replicate()) if placement.is_shard() else own


def shared(x: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """The whole of what all processes have, on the way to where each does something else: gradients are summed.

    Args:
        x: This process's tensor.
        mesh: The processes.
        placement: `Replicate()`: all have it alike. `Shard(n)`: each has an equal part along dimension n, in the order
            of the ranks.
    """
    if mesh is None:
        return x
    whole = DTensor.from_local(x, mesh, [placement]).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def summed(x: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """The sum over the processes of what each has.

    Args:
        x: This process's term.
        mesh: The processes.
        placement: `Replicate()`: all go on with the whole sum. `Shard(n)`: each with its part along dimension n.
    """
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[placement]).to_local()


def scattered(x_N: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """This process's part along the first dimension of what all have alike."""
    if mesh is None:
        return x_N
    return DTensor.from_local(x_N, mesh, [Replicate()]).redistribute(placements=[Shard(0)]).to_local()


def gathered(x_N: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The way back from `scattered`: all have the whole, and go on with it alike."""
    if mesh is None:
        return x_N
    return DTensor.from_local(x_N, mesh, [Shard(0)]).redistribute(placements=[Replicate()]).to_local()
