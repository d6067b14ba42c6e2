"""Kills and errors of the disk in a training run, at any change of a file: the next run has the undisturbed result."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fuzzing
from core.training_runs import docstrings, metrics, options, write
from faults import Faults, Outcome, contents, disturb, places, words
from llama_te_core.files.checksums import problems

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
STEPS = 3
# They have an id of the save, or the time of the source. The file of tensors holds pickles too, which differ.
DIFFERENT = {".metadata", "checksums.json", "conversion.json", "__0_0.distcp"}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class Training:
    """A run with a checkpoint after each step, of which one is kept, and with both exports."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}  # of the expected checkpoints
        self.texts = write(folder, docstrings(60))
        whole = self.start(folder / "expected", keep=STEPS)
        assert whole.status == 0, whole.said
        self.expected = folder / "expected"
        self.reset()
        undisturbed = self.run()
        assert undisturbed.status == 0, undisturbed.said
        self.changes = undisturbed.changes

    def start(self, run: Path, keep: int = 1, at: int = -1, error: int = 0) -> Outcome:
        changes: dict[str, Any] = {f"model__shape__{name}": value for name, value in SHAPE.items()}
        arguments = options(
            run, self.texts, steps=STEPS, checkpoint__interval=1, checkpoint__keep=keep, data__tokens_per_batch=128,
            data__sequence_length=64, schedule__kind="constant", export__te=True, export__hf=True, **changes,
        )  # fmt: skip
        return self.faults.run("llama_te_core.train.command:main", arguments, folder=run, at=at, error=error)

    def reset(self) -> None:
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def run(self, at: int = -1, error: int = 0) -> Outcome:
        return self.start(self.folder / "run", at=at, error=error)

    def check(self, outcome: Outcome, again: bool) -> None:
        """Checkpoints and exports are whole or absent. The next run ends with the undisturbed result."""
        run = self.folder / "run"
        steps = sorted(path.name for path in run.glob("checkpoints/step-????????"))
        for name in steps:
            self.same(f"checkpoints/{name}")
        for name in ("te", "hf"):
            if (run / name).exists():
                self.same(name)
        losses = [row["loss"] for row in metrics(run)]
        assert losses == [row["loss"] for row in metrics(self.expected)][: len(losses)]
        if again:
            assert outcome.status == 0, outcome.said
            assert steps == [f"step-{STEPS:08d}"] and (run / "te").exists() and (run / "hf").exists()
            assert len(losses) == STEPS
            assert not list(run.rglob("*.unfinished"))
        elif outcome.status > 0:
            # TensorBoard's thread may write its traceback at the same time.
            assert re.search(r"llama-te-train: .*" + re.escape(str(self.folder)), outcome.said), outcome.said
            assert (
                "Traceback" not in outcome.said
                or "_AsyncWriterThread" in outcome.said
                or "Exception in thread" in outcome.said
            )

    def same(self, name: str) -> None:
        checked = self.folder / "run" / name
        assert problems(checked) == []
        found, expected = contents(checked), contents(self.expected / name)
        assert found.keys() == expected.keys()
        assert {file for file in found if found[file] != expected[file]} <= DIFFERENT
        if name.startswith("checkpoints/"):
            if name not in self.tensors:
                self.tensors[name] = self.load(self.expected / name)
            tensors = self.load(checked)
            assert tensors.keys() == self.tensors[name].keys() and len(tensors) > 10
            assert all(torch.equal(tensor, self.tensors[name][key]) for key, tensor in tensors.items())

    def load(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """Return the weights and the tensors of the optimizer's state."""
        dcp_to_torch_save(checkpoint, self.folder / "loaded")
        state = torch.load(self.folder / "loaded", weights_only=False)
        moments = {
            f"{name}.{key}": each for name, of in state["optimizer"]["state"].items() for key, each in of.items()
        }
        return state["model"] | moments


STAGES = {
    r".*\.lock|": "a lock",
    r".*/step-\d+\.partial": "the folder of a checkpoint",
    r".*/step-.*": "a file of a checkpoint",
    r".*/tensorboard.*": "TensorBoard's files",
    r".*/\.te\.unfinished.*": "the export",
    r".*/\.hf\.unfinished.*": "the converted export",
    r".*metrics\.jsonl": "metrics",
    r".*config\.yaml.*": "config.yaml",
}


def stage(change: str) -> str:
    path = change.partition(" ")[2]
    return next((name for pattern, name in STAGES.items() if re.fullmatch(pattern, path)), "a folder")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, faults: Faults) -> Training:
    return Training(tmp_path_factory.mktemp("training"), faults)


@pytest.mark.fuzz
def test_killed_and_run_again(training: Training, counts: Callable[[str], None]) -> None:
    # The last checkpoint is whole here, and the one before is not removed yet.
    saved = max(place for place, change in enumerate(training.changes) if change == "sync /checkpoints")
    chosen = sorted({*places(training.changes, 30 * fuzzing.ROUNDS), saved})
    stages = disturb(training.run, chosen, 0, reset=training.reset, check=training.check, stage=stage)
    assert stages.total() >= 25
    assert {"a file of a checkpoint", "the export", "the converted export"} <= stages.keys()
    counts(f"training: {stages.total()} kills among {len(training.changes)} changes of files: {words(stages)}")


@pytest.mark.fuzz
def test_a_disk_that_refuses(training: Training, counts: Callable[[str], None]) -> None:
    total = {}
    for number in DISK_ERRORS:
        chosen = places(training.changes, (16 if number == errno.ENOSPC else 3) * fuzzing.ROUNDS)
        stages = disturb(training.run, chosen, number, reset=training.reset, check=training.check, stage=stage)
        total[errno.errorcode[number]] = stages.total()
    counts(f"training: errors of the disk: {', '.join(f'{count} {code}' for code, count in total.items())}")
