"""The mesh of processes, and a process's place in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .sizes import ParallelSizes

T = TypeVar("T")


def process_rank() -> int:
    """Return this process's number; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run an action on rank 0, and return its result, or raise its error, in all processes.

    Args:
        action: Its result and its error must be picklable.
        group: The processes, all of them by default.
    """
    outcome: list[Any] = [None]
    if process_rank() == 0:
        try:
            outcome = [action()]
        except Exception as error:  # all processes must raise any error
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


def make_mesh(sizes: ParallelSizes, device_type: str) -> DeviceMesh:
    """Make the mesh of all processes, with the dimensions `replicate`, `shard`, `context` and `tensor`.

    Args:
        sizes: Sizes of the dimensions.
        device_type: The type of the model's device, "cuda" or "cpu".

    Raises:
        RuntimeError: There is no process group.
        ValueError: The sizes do not fit the number of processes.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start the processes with torchrun and call torch.distributed."
            "init_process_group() first."
        )
    known = sizes.resolve(dist.get_world_size())
    names = tuple(field.name for field in fields(known))
    return init_device_mesh(device_type, astuple(known), mesh_dim_names=names)


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return this process's number among the processes with different batches, and the number of these processes."""
    if mesh is None:
        return 0, 1
    shards = mesh["shard"].size()
    return (
        mesh.get_local_rank("replicate") * shards + mesh.get_local_rank("shard"),
        mesh["replicate"].size() * shards,
    )
