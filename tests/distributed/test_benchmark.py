"""`benchmarks/train.py` on one process and on meshes, with a small model; what it measures is not looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed import benchmark_run
from distributed.benchmark_run import ROW, benchmark
from distributed.processes import start


@pytest.mark.parametrize(
    ("world_size", "meshes"),
    [
        pytest.param(2, ["shard=-1", "context=2"], marks=pytest.mark.processes(2)),
        pytest.param(4, ["replicate=2,shard=2", "shard=1,context=4,context_kind=a2a"], marks=pytest.mark.processes(4)),
    ],
)
def test_a_row_on_one_gpu_and_on_meshes(device: str, tmp_path: Path, world_size: int, meshes: list[str]) -> None:
    start(benchmark_run.run, world_size, device, tmp_path, meshes)
    alone, sharded, in_context = torch.load(tmp_path / "figures.pt")
    assert [alone["who"], sharded["who"], in_context["who"]] == ["llama-te", *meshes]
    assert [each["gpus"] for each in (alone, sharded, in_context)] == [1, world_size, world_size]
    for figure in (alone, sharded, in_context):
        assert figure["what"] == ROW
        assert figure["rate"] > 0 and figure["flops"] > 0
    if device == "cpu":  # the most of all processes, in GB
        assert [each["memory"] for each in (alone, sharded, in_context)] == [1, world_size, world_size]
    # Context ranks share the batch that one GPU has, so that they learn the same; measured: 2e-3.
    assert in_context["loss"] == pytest.approx(alone["loss"], abs=0.02)
    # Other processes have other random tokens, which are learnt as fast.
    assert sharded["loss"] != alone["loss"]
    assert sharded["loss"] == pytest.approx(alone["loss"], abs=0.2)


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        (["--parallel", "shard"], None, "'shard' is no mesh: name integers"),
        (["--parallel", "shard=2,depth=2"], None, "'shard=2,depth=2' is no mesh: name integers"),
        (["--parallel", "context=0"], None, "'context=0' is no mesh: name integers"),
        (["--parallel", "shard=2"], None, "--parallel shard=2: processes are started by torchrun"),
        (["--parallel", "shard=3"], "2", "--parallel shard=3: replicate=1, shard=3, context=1, tensor=1 need 3"),
    ],
)
def test_what_cannot_be_a_mesh_is_refused(
    words: list[str],
    processes: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit):
        benchmark().arguments(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_rows_and_meshes_that_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    program = benchmark()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert program.arguments([]).rows == program.ROWS
    assert program.arguments([]).parallel == []
    chosen = program.arguments(["--rows", "131,072"])
    assert chosen.rows == ["8B, 131,072 tokens bf16", "8B, 131,072 tokens FP8 current"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert program.arguments([]).parallel == ["shard=-1"]
    assert program.arguments(["--parallel", "shard=4", "context=4"]).parallel == ["shard=4", "context=4"]
