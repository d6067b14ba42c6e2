"""Processes that train together: their start, and the setup of each process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# The fork server imports modules once; each process is a copy of the server.
PRELOADED = ["llama_te_core.train.loop", "torch.distributed.checkpoint", "core.training_runs"]


def start(run: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Run `run(rank, world_size, *arguments)` in `world_size` processes, and wait for them."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(run, (world_size, *arguments), nprocs=world_size, start_method="forkserver")


class Processes:
    """Starts processes at the first request for their findings.

    Args:
        run: The function of each process, as in `start`; it writes to `findings-RANK.pt` in its folder argument.
        device: "cpu" or "cuda".
        folder: The parent of one folder for each number of processes.
    """

    def __init__(self, run: Callable[..., None], device: str, folder: Path) -> None:
        self.run, self.device, self.folder = run, device, folder
        self.findings: dict[int, list[dict[str, Any]]] = {}

    def of(self, world_size: int) -> list[dict[str, Any]]:
        """Return the findings of each of `world_size` processes."""
        if world_size not in self.findings:
            folder = self.folder / str(world_size)
            folder.mkdir()
            start(self.run, world_size, self.device, folder)
            self.findings[world_size] = [torch.load(folder / f"findings-{rank}.pt") for rank in range(world_size)]
        return self.findings[world_size]


def join(rank: int, world_size: int, device: str, rendezvous: Path) -> torch.device:
    """Join the process group; new tensors are then on the process's device.

    Args:
        rank: The number of this process.
        world_size: The number of processes.
        device: "cpu" or "cuda".
        rendezvous: The path of a new file, where the processes meet.
    """
    torch.set_num_threads(1)
    own = torch.device(device, local_rank(rank, world_size)) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    torch.set_default_device(own)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    # If a process fails, the others stop waiting after this time.
    timeout = timedelta(minutes=3)
    dist.init_process_group(backend, init_method=rendezvous.as_uri(), rank=rank, world_size=world_size, timeout=timeout)
    return own


def local_rank(rank: int, world_size: int) -> int:
    """Return the number of a process's GPU; if there are fewer GPUs than processes, let NCCL share them.

    NCCL refuses two ranks on one GPU of one host. So each rank then says that it is a host of its own, and NCCL sends
    through sockets (the environment variables of NCCL's documentation). Each process calls this before its first
    communication.
    """
    gpus = torch.cuda.device_count()
    if world_size > gpus > 0:
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    return rank % max(gpus, 1)
