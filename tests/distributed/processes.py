"""Processes that train together: how they are started, and how each begins."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# The server imports once, and each process is a copy of it.
PRELOADED = ["llama_te_core.train.loop", "torch.distributed.checkpoint", "core.training_runs"]


def start(run: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Have `run(rank, world_size, *arguments)` done by so many processes, and wait for them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(run, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


class Processes:
    """Starts processes when they are first asked for.

    Args:
        run: What each does, as in `start`; it writes what it finds to `findings-RANK.pt` in the folder it is given.
        device: "cpu" or "cuda".
        folder: Has a folder for each number of processes.
    """

    def __init__(self, run: Callable[..., None], device: str, folder: Path) -> None:
        self.run, self.device, self.folder = run, device, folder
        self.findings: dict[int, list[dict[str, Any]]] = {}

    def of(self, world_size: int) -> list[dict[str, Any]]:
        """What each of so many processes found."""
        if world_size not in self.findings:
            folder = self.folder / str(world_size)
            folder.mkdir()
            start(self.run, world_size, self.device, folder)
            self.findings[world_size] = [torch.load(folder / f"findings-{rank}.pt") for rank in range(world_size)]
        return self.findings[world_size]


def join(rank: int, world_size: int, device: str, rendezvous: Path) -> torch.device:
    """Become one of the processes; new tensors are on its device from now on.

    Args:
        rank: Its number.
        world_size: How many there are.
        device: "cpu" or "cuda".
        rendezvous: A file that is not there yet, where they meet.
    """
    torch.set_num_threads(1)
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    torch.set_default_device(own)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # Where one of them ended by an error, the others wait no longer than that.
    timeout = timedelta(minutes=3)
    dist.init_process_group(backend, init_method=rendezvous.as_uri(), rank=rank, world_size=world_size, timeout=timeout)
    return own
