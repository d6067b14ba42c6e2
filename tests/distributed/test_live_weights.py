"""Weights that FSDP has spread over processes come into the engine of each process, gathered one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.live_weights_run import run
from distributed.processes import start


@pytest.mark.processes(2)
def test_sharded_weights_come_into_the_engine(device: str, tmp_path: Path) -> None:
    start(run, 2, device, tmp_path)
    first, second = (torch.load(tmp_path / f"findings-{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second and first["before"] != first["after"]
