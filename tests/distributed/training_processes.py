"""Processes that run the training command, several times each; started by test_train_command.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from core.training_runs import options
from distributed.processes import local_rank
from llama_te_core.layers.collectives import local_part
from llama_te_core.train.command import main
from llama_te_core.train.data.batch_stream import Batch, BatchStream
from llama_te_core.train.finite_updates import FiniteUpdates
from llama_te_core.train.metrics import Metrics


def run(rank: int, world_size: int, ports: list[int], runs: list[tuple[Path, Path, dict[str, Any]]]) -> None:
    """Run each training run in turn, with the environment that torchrun would set.

    Args:
        rank: The number of this process.
        world_size: The number of processes.
        ports: For each run, the port of the TCPStore where the processes meet.
        runs: Folder, source and changes of `options`; "stop" is the batch at which the last process gets a SIGTERM, and
            "spoil" the step at which its loss is NaN, with finite gradients.
    """
    for port, (folder, source, changes) in zip(ports, runs, strict=True):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": local_rank(rank, world_size),
            "WORLD_SIZE": world_size,
            "MASTER_PORT": port,
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ |= {name: str(value) for name, value in environment.items()}
        own = dict(changes)
        stop, spoil = own.pop("stop", None), own.pop("spoil", None)
        with pytest.MonkeyPatch.context() as patch:
            if stop is not None and rank == world_size - 1:
                patch.setattr(BatchStream, "next", _stopping(stop))
            if spoil is not None:
                patch.setattr(FiniteUpdates, "step", _spoiling(spoil, rank == world_size - 1))
                if rank == world_size - 1:
                    patch.setattr(Metrics, "add", _spoiling_records(spoil))
            assert main(options(folder, source, **own)) == (0 if spoil is None else 1)


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


def _spoiling(step: int, last_process: bool) -> Any:
    """Return a step of `FiniteUpdates` that checks that from the given step on no process changes its weights."""
    count = 0
    original = FiniteUpdates.step

    def following(updates: FiniteUpdates, loss: torch.Tensor, norm: torch.Tensor) -> None:
        nonlocal count
        count += 1
        weights = [each for group in updates.optimizer.param_groups for each in group["params"]]
        before = [each.detach().clone() for each in weights]
        original(updates, loss * float("nan") if count == step and last_process else loss, norm)
        same = all(torch.equal(local_part(one), local_part(other)) for one, other in zip(before, weights, strict=True))
        assert same == (count >= step)

    return following


def _spoiling_records(spoilt: int) -> Any:
    original = Metrics.add

    def following(metrics: Metrics, step: int, loss: torch.Tensor, norm: torch.Tensor, rate: float) -> None:
        original(metrics, step, loss * float("nan") if step == spoilt else loss, norm, rate)

    return following
