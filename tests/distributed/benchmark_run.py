"""Processes that measure training as `benchmarks/train.py` does, on a small model; started by test_benchmark.py."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from distributed.processes import join

ROW = "small bf16"
PRODUCT_RATE = 1e12


def benchmark() -> ModuleType:
    """The program, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "train.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_training", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(rank: int, world_size: int, device: str, folder: Path, meshes: list[str]) -> None:
    """What one process does; the first writes its figures."""
    join(rank, world_size, device, folder / "rendezvous")
    program = benchmark()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "DEVICE", device)
        patch.setattr(program, "VOCABULARY", 512)
        patch.setitem(program.SHAPES, "small", shape | {"num_key_value_heads": 4, "head_dim": 32})
        patch.setitem(program.LOADS, "small", program.Load(2, 64, "full"))
        if device == "cpu":
            for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
                patch.setattr(torch.cuda, name, lambda: None)
            patch.setattr(torch.cuda, "max_memory_allocated", lambda: 1e9 * (1 + rank))
        options = argparse.Namespace(rows=[ROW], parallel=meshes, peers=False, profile=None)
        figures = program.take(options, {"bf16": PRODUCT_RATE})
    if rank == 0:
        torch.save([vars(figure) for figure in figures], folder / "figures.pt")
    dist.destroy_process_group()
