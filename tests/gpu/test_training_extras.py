"""The training command's options for Transformer Engine layers: tensor statistics, and activations on the host.

Each run is a separate process: a layer reads the inspection setting once per process.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.training_runs import docstrings, metrics, options, write

pytestmark = [pytest.mark.hopper, pytest.mark.blackwell]

EXAMPLE = Path(__file__).parents[2] / "examples" / "inspect.yaml"
MODULES = ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp.fc1", "layernorm_mlp.fc2")
STATISTICS = ("cur_amax", "underflows%", "mse", "scale_inv_min", "scale_inv_max")


def run(folder: Path, **changes: Any) -> Path:
    """The folder of a run of the training command."""
    source = write(folder, docstrings(150)[:16])
    name = f"run-{changes.get('activation_offload_layers', 0)}"
    words = options(folder / name, source, checkpoint__interval=None, **changes)
    subprocess.run([sys.executable, "-m", "llama_te_core.train", *words], check=True, timeout=300)
    return folder / name


@pytest.mark.parametrize(
    ("recipe", "activations"), [("delayed", "none"), ("current", "none"), ("current", "full"), ("block", "none")]
)
def test_statistics_of_each_product(recipe: str, activations: str, tmp_path: Path) -> None:
    features = tmp_path / "features.yaml"
    features.write_text(EXAMPLE.read_text(encoding="utf-8").replace("freq: 100", "freq: 2"), encoding="utf-8")
    folder = run(
        tmp_path,
        steps=4,
        precision__compute="fp8",
        precision__fp8_recipe=recipe,
        activation_checkpointing=activations,
        log__inspect=features,
    )
    rows = [json.loads(line) for line in (folder / "inspect" / "statistics.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [2, 4]
    tensors = [
        f"model.layers.{layer}.{module}_{tensor}"
        for layer in (1, 2, 3, 4)
        for module in MODULES
        for tensor in ("activation", "weight", "gradient")
    ]
    for row in rows:
        assert row.keys() == {f"{tensor}_{statistic}" for tensor in tensors for statistic in STATISTICS}
        assert all(math.isfinite(value) for value in row.values())
        for tensor in tensors:
            amax, underflows, error, scale_min, scale_max = (row[f"{tensor}_{statistic}"] for statistic in STATISTICS)
            assert amax > 0 and 0 < error < amax**2, tensor
            assert 0 <= underflows < 100, tensor
            # Block scales have uninitialized padding, and TE 2.20 includes the padding in its statistics.
            assert recipe == "block" or 0 < scale_min <= scale_max, tensor


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_activations_on_the_host(compute: str, tmp_path: Path, measured: Callable[[str, float, float], None]) -> None:
    # Large enough: Transformer Engine leaves tensors of less than 256 Ki elements where they are.
    changes = {
        "steps": 10,
        "precision__compute": compute,
        "model__shape__hidden_size": 512,
        "model__shape__intermediate_size": 1024,
        "data__tokens_per_batch": 8192,
    }
    kept, offloaded = (metrics(run(tmp_path, **changes, activation_offload_layers=layers)) for layers in (0, 2))
    assert offloaded[0]["loss"] == kept[0]["loss"]
    # The backward pass of attention sums in another order each time, which changes the losses.
    norms = [rows[0]["gradient_norm"] for rows in (offloaded, kept)]
    measured("norm of the first step's gradients, relative difference", abs(norms[0] / norms[1] - 1), 2e-3)
    worst = max(abs(one["loss"] - other["loss"]) for one, other in zip(offloaded, kept, strict=True))
    measured("losses of 10 steps, the largest difference", worst, 0.02)
    memory = [rows[-1]["memory_gib"] for rows in (offloaded, kept)]
    measured("peak memory, of that without offloading", memory[0] / memory[1], 0.95)
