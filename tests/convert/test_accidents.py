"""Kills and errors of the disk in conversions and exports, at any change of a file: nothing looks right that is not."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fuzzing
from faults import Faults, Outcome, contents, disturb, places, words
from llama_te_core.files.checksums import read_checksums

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENAMETOOLONG)
COMMANDS = ("to-te", "adapter-to-te", "standalone")


class Conversion:
    """A command that converts or exports to `folder`/out, and how its result looks."""

    def __init__(self, name: str, source: Path, folder: Path, faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.kept: dict[str, int] = {}
        self.most_kept = 0
        out = folder / "out"
        cli = "llama_te_convert.cli:main"
        self.action, self.arguments = {
            "to-te": (cli, [["to-te", source / "hf", out, "--max-shard-size", "20KB"]]),
            "adapter-to-te": (cli, [["adapter-to-te", source / "adapter", out]]),
            "standalone": ("llama_te_convert.targets.standalone:export_te_checkpoint", [source / "te", out]),
        }[name]
        self.reset()
        undisturbed = self.run()
        assert undisturbed.status == 0, undisturbed.said
        self.changes = undisturbed.changes
        self.expected = contents(out)
        assert self.expected
        assert os.listdir(folder) == ["out"]

    def reset(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def run(self, at: int = -1, error: int = 0) -> Outcome:
        return self.faults.run(self.action, *self.arguments, folder=self.folder, at=at, error=error)

    def check(self, outcome: Outcome, again: bool) -> None:
        """The result is whole or absent. The next run succeeds, or finds the whole result."""
        whole = (self.folder / "out").exists()
        if whole:
            assert contents(self.folder / "out") == self.expected
        partial = self.folder / "out.partial"
        for shard in partial.glob("*.safetensors"):
            assert shard.read_bytes() == self.expected[shard.name]
        if again:
            for name, written in self.kept.items():
                assert (self.folder / "out" / name).stat().st_mtime_ns == written, "a finished shard was made again"
            assert whole, outcome.said
            assert outcome.status == 0 or "exists already" in outcome.said
            assert not {path for path in os.listdir(self.folder) if not path.startswith(".")} - {"out"}
            return
        finished = {name for name in (read_checksums(partial) or {}) if (partial / name).exists()}
        self.kept = {name: (partial / name).stat().st_mtime_ns for name in finished if name.endswith(".safetensors")}
        self.most_kept = max(self.most_kept, len(self.kept))
        if outcome.status >= 0:
            assert whole or outcome.status != 0
            if outcome.status != 0:
                assert re.search(
                    r"(CheckpointError|^llama-te-convert): .*(cannot be|is full|failed)", outcome.last_line
                ), outcome.said
                assert str(self.folder) in outcome.last_line
                assert "standalone" in self.action or len(outcome.said.splitlines()) == 1, outcome.said


def stage(change: str) -> str:
    kind, path = change.split(" ", 1)
    name = path.rpartition("/")[2]
    if kind == "rename" and re.fullmatch(r"/out\.partial|.*\.unfinished/out", path):
        return "the last rename"
    if kind == "sync" or kind == "remove":
        return f"a {kind}"
    if name.endswith(".lock"):
        return "the lock"
    what = "tensors" if ".safetensors" in name else "another file"
    return f"a {kind} of {what}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in both layouts, and an adapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_te_convert import convert_checkpoint

    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    (folder / "hf" / "LICENSE").write_text("licence")
    convert_checkpoint(str(folder / "hf"), folder / "te", to_te=True)
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(folder / "hf")}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    return folder


@pytest.mark.fuzz
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(
    name: str, source: Path, tmp_path: Path, faults: Faults, counts: Callable[[str], None]
) -> None:
    conversion = Conversion(name, source, tmp_path / "work", faults)
    chosen = places(conversion.changes, 30 * fuzzing.ROUNDS)
    kill = functools.partial(
        disturb, conversion.run, error_number=0, reset=conversion.reset, check=conversion.check, stage=stage
    )
    stages = kill(places=chosen)
    # Few changes are renames of tensors, and threads move them: where the kills have missed them, more try to meet one.
    of_tensors = {"a write of tensors", "a rename of tensors"} if name == "to-te" else set()
    for place, change in enumerate(conversion.changes):
        if stage(change) in of_tensors - stages.keys():
            stages += kill(places=[place])
    assert stages.total() >= min(25, len(conversion.changes) - 3)  # threads change the numbers a little
    assert {"the last rename", "a sync"} <= stages.keys()
    assert name != "to-te" or conversion.most_kept > 2
    assert name != "to-te" or {"a write of tensors", "a rename of tensors"} <= stages.keys()
    counts(f"{name}: {stages.total()} kills among {len(conversion.changes)} changes of files: {words(stages)}")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_refuses(
    name: str, source: Path, tmp_path: Path, faults: Faults, counts: Callable[[str], None]
) -> None:
    conversion = Conversion(name, source, tmp_path / "work", faults)
    total: Any = {}
    for number in DISK_ERRORS:
        wanted = (len(conversion.changes) if name == "to-te" else 30) if number == errno.ENOSPC else 8
        chosen = places(conversion.changes, wanted * fuzzing.ROUNDS)
        stages = disturb(conversion.run, chosen, number, reset=conversion.reset, check=conversion.check, stage=stage)
        total[errno.errorcode[number]] = stages.total()
    counts(f"{name}: errors of the disk: {', '.join(f'{count} {code}' for code, count in total.items())}")


def test_a_conversion_whose_writer_was_killed_goes_to_another(source: Path, tmp_path: Path, faults: Faults) -> None:
    """The lock of a killed process is free at once, and names nobody."""
    conversion = Conversion("to-te", source, tmp_path / "work", faults)
    conversion.reset()
    assert conversion.run(at=len(conversion.changes) // 2).status == -9
    assert "pid " in (conversion.folder / ".out.lock").read_text()
    conversion.check(conversion.run(), True)
    assert os.listdir(conversion.folder) == ["out"]
