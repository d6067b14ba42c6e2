"""Processes that run the training command, several times each; started by test_train_command.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.training_runs import options
from llama_te_core.train.command import main
from llama_te_core.train.data.batch_stream import Batch, BatchStream


def run(rank: int, world_size: int, ports: list[int], runs: list[tuple[Path, Path, dict[str, Any]]]) -> None:
    """Run each training run in turn, with the environment that torchrun would set.

    Args:
        rank: The number of this process.
        world_size: The number of processes.
        ports: For each run, the port of the TCPStore where the processes meet.
        runs: Folder, source and changes of `options`; "stop" is the batch at which the last process gets a SIGTERM.
    """
    for port, (folder, source, changes) in zip(ports, runs, strict=True):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in environment.items()}
        own = dict(changes)
        stop = own.pop("stop", None)
        with pytest.MonkeyPatch.context() as patch:
            if stop is not None and rank == world_size - 1:
                patch.setattr(BatchStream, "next", _stopping(stop))
            assert main(options(folder, source, **own)) == 0


def _stopping(step: int) -> Any:
    count = 0
    original = BatchStream.next

    def following(stream: BatchStream) -> Batch:
        nonlocal count
        count += 1
        if count == step:
            signal.raise_signal(signal.SIGTERM)
        return original(stream)

    return following
