"""What a layer that is split over processes exchanges, as functions that autograd knows.

Each takes the mesh of the processes, of one dimension, or `None` for a layer that is not split: then nothing happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def local(weight: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The part of a distributed weight that this process computes with."""
    if mesh is None:
        return weight
    assert isinstance(weight, DTensor)
    return weight.to_local()


def shared(x: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """What all processes have alike, on the way to where each does something else with it: gradients are summed."""
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Replicate()]).to_local(grad_placements=[Partial()])


def summed(x: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """The sum over the processes of what each has; all go on with it alike."""
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()


def gathered(x_BS: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Along the second dimension, what all processes have, in the order of their ranks; equally much from each.

    Each goes on to do something else with it: gradients are summed.
    """
    if mesh is None:
        return x_BS
    whole = DTensor.from_local(x_BS, mesh, [Shard(1)]).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])
