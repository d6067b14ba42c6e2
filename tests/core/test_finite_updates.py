"""A step that is not finite changes no weight, no optimizer state and no checkpoint, and the run names it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from core.training_runs import docstrings, metrics, options, train, write
from llama_te_core.layers.backend import LayerBackend
from llama_te_core.train import loop
from llama_te_core.train.command import main
from llama_te_core.train.finite_updates import FiniteUpdates

SETTINGS: dict[str, Any] = {
    "log__interval": 10, "schedule__kind": "constant", "checkpoint__interval": None, "data__tokens_per_batch": 128,
    "data__sequence_length": 128, "model__shape__num_hidden_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts"), docstrings(126)[:8])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Collect the optimizers of the runs that follow."""
    found: list[torch.optim.Optimizer] = []
    make_optimizer = loop.make_optimizer

    def making(*arguments: Any) -> torch.optim.Optimizer:
        found.append(make_optimizer(*arguments))
        return found[-1]

    monkeypatch.setattr(loop, "make_optimizer", making)
    return found


def values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all weights and all of the optimizer's state, this process's parts."""
    found = []
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        state = optimizer.state[parameter]
        found += [parameter.detach(), *(state[name] for name in sorted(state))]
    return [getattr(each, "to_local", lambda each=each: each)() for each in found]


def poison(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Give one gradient of a step an element that is not finite."""
    clip_gradients, steps = loop.clip_gradients, 0

    def clipping(model: Any, max_norm: float) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == step:
            gradient = next(each.grad for each in model.parameters() if each.dim() > 1)
            getattr(gradient, "to_local", lambda: gradient)()[0, 0] = value
        return clip_gradients(model, max_norm)

    monkeypatch.setattr(loop, "clip_gradients", clipping)


@pytest.mark.parametrize(
    ("value", "fused", "changes"),
    [
        (float("nan"), False, {}),
        (float("inf"), True, {}),
        (float("nan"), True, {"precision__compute": "bf16"}),  # weights are split by FSDP
        (float("-inf"), False, {"data__batches_per_step": 2}),
    ],
)
def test_weights_and_state_are_those_of_the_last_good_step(
    value: float, fused: bool, changes: dict[str, Any], tmp_path: Path, source: Path,
    runs: list[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if fused:  # as on a GPU

        def make_adamw(self: Any, groups: Any, options: Any, first_values: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(groups, **options, fused=True)

        monkeypatch.setattr(LayerBackend, "make_adamw", make_adamw)
    train(tmp_path / "good", source, **SETTINGS | changes, steps=3)
    poison(monkeypatch, 4, value)
    assert main(options(tmp_path / "bad", source, **SETTINGS | changes, steps=20)) == 1
    message = capsys.readouterr().err
    assert re.search(r"llama-te-train: step 4 has loss \d\S+ and a norm of gradients of (nan|inf)\.", message)
    assert "stay as after step 3. Training stops without saving" in message and "Traceback" not in message
    assert [row["step"] for row in metrics(tmp_path / "bad")] == [1, 2, 3, 4]
    good, bad = map(values, runs)
    assert len(good) == len(bad) > 30
    assert all(torch.equal(one, other) for one, other in zip(good, bad, strict=True))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_enough_and_the_host_does_not_wait(
    loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    updates = FiniteUpdates(torch.optim.AdamW([weight], fused=True), torch.device("cpu"))

    def read(tensor: torch.Tensor, *arguments: Any) -> Any:
        raise AssertionError("the host waits for the device")

    before: list[torch.Tensor] = []
    for each in (1.0, loss, 1.0):
        before.append(weight.detach().clone())
        weight.grad = torch.ones(3)
        with monkeypatch.context() as patch:
            for name in ("__bool__", "item", "tolist", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, read)
            updates.step(torch.tensor(each), torch.tensor(1.0))
    before.append(weight.detach())
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(before)]
    assert changed == [True, False, False]


def test_no_checkpoint_is_written_after_a_bad_step(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 4, float("nan"))
    assert main(options(tmp_path, source, **SETTINGS | {"checkpoint__interval": 3, "steps": 20})) == 1
    assert "step 4 has loss" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_step_without_labels_changes_no_loss_to_nan(tmp_path: Path) -> None:
    """With splitting, a batch may hold the middle of a long prompt alone."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input_ids": [5] * 300, "labels": [-100] * 299 + [7]}) + "\n")
    curve = train(tmp_path / "run", file, **SETTINGS | {"data__tokenizer": None, "steps": 3})
    assert curve[:2] == [0, 0] and curve[2] > 1
