"""`benchmarks/train.py` with a small model, in one process and on meshes, and its page. No test checks speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import limits
import train
from distributed import benchmark_run
from distributed.benchmark_run import PRODUCT_RATE, ROW
from distributed.processes import start
from llama_te_core import NVLlamaConfig
from llama_te_core.train.config import ParallelConfig
from llama_te_core.train.metrics import training_flops


@pytest.mark.parametrize(
    ("world_size", "meshes"),
    [
        pytest.param(
            2, ["shard=2,reshard_after_forward=false,reduce=bf16", "context=2"], marks=pytest.mark.processes(2)
        ),
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
        # The limit for one kind of product is a share of its rate, on any mesh.
        assert figure["rate"] / figure["limit"] == pytest.approx(figure["flops"] * 1e12 / PRODUCT_RATE)
    if device == "cpu":  # the most of all processes, in GB
        assert [each["memory"] for each in (alone, sharded, in_context)] == [1, world_size, world_size]
    # Context ranks share one GPU's batch, so they learn the same; measured: 2e-3.
    assert in_context["loss"] == pytest.approx(alone["loss"], abs=0.02)
    # Other processes have other random tokens, and learn them as fast.
    assert sharded["loss"] != alone["loss"]
    assert sharded["loss"] == pytest.approx(alone["loss"], abs=0.2)


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        (["--parallel", "shard"], None, "'shard' is not a mesh: give sizes of at least 1"),
        (["--parallel", "shard=2,depth=2"], None, "'shard=2,depth=2' is not a mesh: give sizes of at least 1"),
        (["--parallel", "context=0"], None, "'context=0' is not a mesh: give sizes of at least 1"),
        (["--parallel", "reduce=fp16"], None, "(context_kind: p2p, all_gather, a2a; reshard_after_forward: true, "),
        (
            ["--parallel", "context=2,context_kind=ring"],
            None,
            "'context=2,context_kind=ring' is not a mesh: give sizes of at least 1",
        ),
        (["--parallel", "shard=2"], None, "--parallel shard=2: start the processes with torchrun"),
        (["--page", "x.md"], None, "--page x.md: the figures come from a file, so give --json FILE as well"),
        (["--no-runs", "--json", "x.json"], None, "--add and --no-runs only write a page, so give --page FILE"),
        (["--add", "x.json"], None, "--add and --no-runs only write a page, so give --page FILE"),
        (["--parallel", "shard=3"], "2", "--parallel shard=3: replicate=1, shard=3, context=1, tensor=1 need 3"),
    ],
)
def test_what_cannot_be_done_is_refused(
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
        train.arguments(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_rows_and_meshes_that_are_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train.arguments([]).rows == train.ROWS
    assert train.arguments([]).parallel == []
    chosen = train.arguments(["--rows", "131,072"])
    assert chosen.rows == ["8B, 131,072 tokens bf16", "8B, 131,072 tokens FP8 current"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.arguments([]).parallel == ["shard=-1"]
    assert train.arguments(["--parallel", "shard=4", "context=4"]).parallel == ["shard=4", "context=4"]


@pytest.mark.parametrize(
    ("name", "parallel", "reduce"),
    [
        ("shard=2,tensor=4", ParallelConfig(shard=2, tensor=4), "fp32"),
        ("reduce=bf16,reshard_after_forward=false", ParallelConfig(reshard_after_forward=False), "bf16"),
        ("context=2,context_kind=a2a", ParallelConfig(context=2, context_kind="a2a"), "fp32"),
    ],
)
def test_a_run_is_what_the_name_of_its_mesh_says(
    name: str, parallel: ParallelConfig, reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "DEVICE", "cpu")
    build = Mock(side_effect=InterruptedError)
    monkeypatch.setattr("llama_te_core.train.setup.build_model", build)
    with pytest.raises(InterruptedError):
        train.llama_te_step(train.SHAPES["1B"], "bf16", train.LOADS["1B"], name, None)
    config = build.call_args.args[0]
    assert config.parallel == parallel
    assert config.precision.reduce == reduce


def test_the_limit_has_weights_of_layers_in_fp8_and_the_rest_in_bf16() -> None:
    config = NVLlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    rates = {"bf16": 1e12, "FP8": 4e12}
    # Of a layer: queries and what follows them 24 x 48, keys and values 24 x 16, the MLP 24 x 40; forward and twice as
    # much backward, 2 operations for each.
    layers = 3 * 2 * 14 * 3 * (2 * 24 * 48 + 2 * 24 * 16 + 3 * 24 * 40)
    rest = training_flops(config, 14, 14**2) - layers
    least = train.least_seconds(config, 14, 14**2, "FP8 block", rates)
    assert least == pytest.approx(layers / 4e12 + rest / 1e12)
    assert train.least_seconds(config, 14, 14**2, "bf16", rates) == pytest.approx((layers + rest) / 1e12)


def test_products_are_timed_in_the_formats_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "DEVICE", "cpu")
    monkeypatch.setattr(limits, "PRODUCT_SIZE", 64)

    def two_milliseconds(run: Callable[[], object]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(limits, "milliseconds", two_milliseconds)
    rate = pytest.approx(limits.PRODUCTS * 2 * 64**3 / 0.002)
    assert train.product_rates(["1B bf16"]) == {"bf16": rate}
    assert train.product_rates(["1B bf16", "1B FP8 block"]) == {"bf16": rate, "FP8": rate}


def test_a_page_of_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def keep(name: str, gpus: int, **figures: list[Any]) -> Path:
        record = {
            "gpu": "NVIDIA H200", "gpus": gpus, "torch": "2.11", "transformer_engine": "2.20", "transformers": "5.17",
            "product_rates": {"bf16": 800e12, "FP8": 1500e12},
            "figures": [vars(train.Figure(what, *values)) for what, values in figures.items()],
        }  # fmt: skip
        (tmp_path / name).write_text(json.dumps(record))
        return tmp_path / name

    one = keep("one.json", 1, **{"1B FP8 block": ["llama-te", 1, 60_000.0, 53.25, 600.0, 11.0, 80_000.0]})
    four = keep("four.json", 4, **{"8B, 131,072 tokens bf16": ["context=4", 4, 2_000.0, 70.0, 200.0, 11.0, 8_000.0]})
    page = tmp_path / "speed.md"
    words = ["--no-runs", "--json", str(one), "--add", str(four), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    train.main()
    lines = page.read_text().splitlines()
    assert (
        "4 NVIDIA H200, torch 2.11, Transformer Engine 2.20, transformers 5.17; large products reach "
        in page.read_text()
    )
    assert "| 1B FP8 block | llama-te | 1 | 60,000 | 80,000 | 75% | 600 | 75% | 53.2 |" in lines
    assert "| 8B, 131,072 tokens bf16 | context=4 | 4 | 2,000 | 8,000 | 25% | 200 | 25% | 70.0 |" in lines
    assert "(1B: 4 sequences of 4,096 tokens, 8 steps; 8B, 131,072 tokens: 1 sequence of 131,072 t" in page.read_text()
    assert "1B FP8 block, llama-te, 1 GPU" in page.with_suffix(".svg").read_text()
