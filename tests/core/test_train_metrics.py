"""Tests the training command's metrics: operations, peaks, learning rates, and the files that hold them."""

from __future__ import annotations

import math
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from core.training_runs import docstrings, losses, metrics, train, write
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.train import metrics as module
from llama_te_core.train.config import LogConfig, ScheduleConfig
from llama_te_core.train.metrics import Metrics, bf16_product_rate, peak_flops, training_flops
from llama_te_core.train.schedule import learning_rate


def test_operations_of_matrix_products_are_those_that_torch_counts() -> None:
    config = NVLlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, layer_implementation="reference",
    )  # fmt: skip
    model = NVLlamaForCausalLM(config)
    ids_BS = torch.arange(14)[None]
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
    products = counted.get_flop_counts()["Global"]
    weights = sum(flops for name, flops in products.items() if str(name) in ("aten.mm", "aten.addmm"))
    assert weights == training_flops(config, 14, 0)


def test_operations_of_attention_are_half_of_the_square() -> None:
    config = NVLlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, head_dim=8)
    attention = training_flops(config, 0, 14**2)
    # The backward pass costs twice the forward pass. Each of 6 heads has two products of 14 x 14 x 8, with 2 operations
    # for each element.
    assert attention == 3 * 3 * 2 * 6 * (2 * 14 * 14 * 8) / 2


@pytest.mark.parametrize(
    ("gpu", "compute", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp8", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp8", 1513e12),
        ("NVIDIA H200", "fp8", 1978.9e12),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA H200", "nvfp4", None),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA B200", "nvfp4", 9000e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA B300 SXM6 AC", "mxfp8", 4500e12),
        ("NVIDIA GB300", "fp8", 5000e12),
        ("NVIDIA H20", "bf16", None),
        ("NVIDIA H800", "bf16", None),
    ],
)
def test_peaks(gpu: str, compute: str, peak: float | None) -> None:
    assert peak_flops(gpu, compute) == peak


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0, 1), st.sampled_from(["linear", "cosine"]))
def test_the_learning_rate_rises_to_the_largest_and_falls_to_the_last(
    steps: int, warmup: int, final: float, kind: Any
) -> None:
    warmup = min(warmup, steps)
    schedule = ScheduleConfig(kind, warmup, final)
    rates = [learning_rate(step, steps, 2.0, schedule) for step in range(1, steps + 1)]
    top = max(warmup, 1)
    assert rates[:top] == pytest.approx([2.0 * (step / top) for step in range(1, top + 1)])
    assert all(after <= before + 1e-12 for before, after in zip(rates[top - 1 :], rates[top:], strict=False))
    if steps > top:
        assert rates[-1] == pytest.approx(2.0 * final)


def test_the_kinds_of_schedule() -> None:
    def rates(kind: Any) -> list[float]:
        return [learning_rate(step, 5, 1.0, ScheduleConfig(kind, 1, 0.0)) for step in range(1, 6)]

    assert rates("constant") == [1] * 5
    assert rates("linear") == [1, 0.75, 0.5, 0.25, 0]
    assert rates("cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_products_are_timed_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = iter([0.0, 5.0, 6.0, 6.5])  # the first time does not count
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    random = torch.get_rng_state()
    assert bf16_product_rate(torch.device("cpu")) == module.PRODUCTS * 2 * 64**3 / 0.5
    assert torch.equal(torch.get_rng_state(), random)


def test_shares_of_the_peak_and_of_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = NVLlamaConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=6, head_dim=8)
    told = Metrics(
        LogConfig(), tmp_path, config, compute="bf16", device=torch.device("cpu"), ranks=1, step=0, steps=2, settings={}
    )
    assert told.peak is None and told.product_rate is None
    for step in (1, 2):
        told.add(step, torch.tensor(1.0), torch.tensor(1.0), 0.1)
        told.count(14, 14**2)
        told.report()
        told.peak, told.product_rate = 8e9, 4e9
    first, second = metrics(tmp_path)
    assert not first.keys() & {"mfu", "share_of_bf16_products"}
    flops = training_flops(config, 14, 14**2) * second["tokens_per_second"] / 14
    assert (second["mfu"], second["share_of_bf16_products"]) == pytest.approx((flops / 8e9, flops / 4e9))
    line = capsys.readouterr().err.splitlines()[1]
    assert f"MFU {flops / 8e9:.1%}  {flops / 4e9:.0%} of bf16 products" in line


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], list[tuple[int, float]]]:
    """Record the arguments that start runs, and the values that runs log. The last entry is (-1, 0)."""
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, float]] = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values["loss"])), finish=lambda: logged.append((-1, 0.0))
    )
    wandb: Any = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()
    wandb.init = lambda **arguments: started.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return started, logged


def test_a_run_that_goes_on_is_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, logged = fake_wandb(monkeypatch)
    source = write(tmp_path, docstrings(126)[:8])
    settings: dict[str, Any] = {"log__wandb_project": "llamas", "schedule__kind": "constant"}
    for steps in (2, 3):
        train(tmp_path, source, steps=steps, **settings)
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path, source, steps=3, **settings)
    first, second, anew = (each["id"] for each in started)
    assert first == second != anew
    assert [each["resume"] for each in started] == ["allow"] * 3
    assert [step for step, _ in logged] == [1, 2, -1, 3, -1, 1, 2, 3, -1]


def test_metrics_go_to_file_tensorboard_and_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started, logged = fake_wandb(monkeypatch)
    source = write(tmp_path, docstrings(126)[:8])
    curve = train(tmp_path, source, steps=5, log__interval=2, log__wandb_project="llamas", checkpoint__interval=None)

    ((project, settings),) = [(each["project"], each["config"]) for each in started]
    assert (project, settings["steps"]) == ("llamas", 5)
    assert logged == [*enumerate(curve, 1), (-1, 0.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(curve)
    with_speed = [row["step"] for row in metrics(tmp_path) if "tokens_per_second" in row]
    assert with_speed == [2, 4, 5]
    assert losses(tmp_path) == curve
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert f"loss {curve[1]:.4f}" in lines[0] and "tokens/s" in lines[0]
