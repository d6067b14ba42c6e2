"""The communication of split layers, as functions that autograd knows.

Each takes a mesh of one dimension, or `None` for a layer that is not split. With `None` nothing happens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor


def distribute(module: nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    """Turn parameters of a module into `DTensor`s; rank 0 of the mesh decides their values.

    Args:
        module: It is changed.
        mesh: The processes.
        placements: A placement for each parameter, by name.
    """
    for name, placement in placements.items():
        weight = getattr(module, name)
        sharded = distribute_tensor(weight.detach(), mesh, [placement])
        setattr(module, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that may be a `DTensor`, in the same memory. Nothing is sent."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local(weight: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Return the part of a distributed weight that this process computes with."""
    if mesh is None:
        return weight
    assert isinstance(weight, DTensor)
    return weight.to_local()


def local_norm(weight: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """Return a norm's weight, which all processes have alike.

    Its gradient is summed over the processes where each has tokens of its own.

    Args:
        weight: The norm's weight.
        mesh: The processes.
        placement: Of the tokens: `Replicate()` (each process has all of them) or `Shard(0)`.
    """
    own = local(weight, mesh)
    return shared(own, mesh, Replicate()) if placement.is_shard() else own


def shared(x: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """Return a whole tensor, from which each process computes something else. Its gradients are summed.

    Args:
        x: This process's tensor.
        mesh: The processes.
        placement: `Replicate()`: all have the whole. `Shard(n)`: each has an equal part along dimension n, in the order
            of the ranks.
    """
    if mesh is None:
        return x
    whole = DTensor.from_local(x, mesh, [placement]).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def summed(x: torch.Tensor, mesh: DeviceMesh | None, placement: Placement) -> torch.Tensor:
    """Return the sum of the processes' tensors.

    Args:
        x: This process's term.
        mesh: The processes.
        placement: `Replicate()`: each gets the whole sum. `Shard(n)`: each gets its part along dimension n.
    """
    if mesh is None:
        return x
    return DTensor.from_local(x, mesh, [Partial()]).redistribute(placements=[placement]).to_local()


def scattered(x_N: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Return this process's part, along the first dimension, of a tensor that all processes have."""
    if mesh is None:
        return x_N
    return DTensor.from_local(x_N, mesh, [Replicate()]).redistribute(placements=[Shard(0)]).to_local()


def gathered(x_N: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Undo `scattered`: return the whole, with which all processes compute the same."""
    if mesh is None:
        return x_N
    return DTensor.from_local(x_N, mesh, [Shard(0)]).redistribute(placements=[Replicate()]).to_local()
