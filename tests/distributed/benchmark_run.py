"""Processes that measure training as `benchmarks/train.py` does, on a small model; started by test_benchmark.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from distributed.processes import join

ROW = "small bf16"
PRODUCT_RATE = 1e12


def run(rank: int, world_size: int, device: str, folder: Path, meshes: list[str]) -> None:
    """Run one process; the first one writes its figures."""
    join(rank, world_size, device, folder / "rendezvous")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "DEVICE", device)
        patch.setattr(train, "VOCABULARY", 512)
        patch.setitem(train.SHAPES, "small", shape | {"num_key_value_heads": 4, "head_dim": 32})
        patch.setitem(train.LOADS, "small", train.Load(2, 64, "full"))
        if device == "cpu":
            for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
                patch.setattr(torch.cuda, name, lambda: None)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda: 1e9 * (1 + rank))
        options = argparse.Namespace(rows=[ROW], parallel=meshes, peers=False, profile=None)
        figures = train.take(options, {"bf16": PRODUCT_RATE})
    if rank == 0:
        torch.save([vars(figure) for figure in figures], folder / "figures.pt")
    dist.destroy_process_group()
