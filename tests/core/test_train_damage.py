"""Damaged checkpoints of a training run: always noticed, and an older checkpoint takes their place."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuzzing
from core import training_runs
from core.test_train_checkpoints import Run, assert_same, names
from damages import DAMAGES, delete, flip, flip_and_keep_the_time, truncate
from llama_te_convert.cli import main
from llama_te_core.files.checksums import file_problem
from llama_te_core.train.checkpoint import checkpoints as checkpoints_module
from llama_te_core.train.checkpoint.checkpoints import Checkpoints, TrainingCheckpointError

PROBLEMS = {
    "deleted": "is missing",
    "truncated": "bytes in place of",
    "flipped": "has other bytes than checksums.json says (written after checksums.json)",
    "swapped": "bytes in place of",
    "flipped with its old time": "says (older than checksums.json)",
}
FILES = ("__0_0.distcp", ".metadata", "config.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints, run = Checkpoints(folder), Run()
    for step in (1, 2):
        run.train(1)
        checkpoints.save(step, run.model, run.optimizer, run.extra)
    checkpoints.wait()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def resumed(folder: Path) -> tuple[int, Run]:
    run, checkpoints = Run(), Checkpoints(folder)
    step = checkpoints.latest()
    assert step is not None
    checkpoints.load(step, run.model, run.optimizer, run.extra)
    return step, run


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(folder: Path, damage: str, file: str) -> None:
    shutil.copytree(folder, folder.with_name("older"))
    shutil.rmtree(folder.with_name("older") / "step-00000002")
    DAMAGES[damage](folder / "step-00000002" / file)
    with pytest.warns(UserWarning, match="has a damaged checkpoint") as caught:
        step, run = resumed(folder)
    (warning,) = (str(each.message) for each in caught)
    assert (
        f"damaged checkpoint: step 2: {'' if damage == 'swapped' else file}" in warning and PROBLEMS[damage] in warning
    )
    assert "goes on from step 1, and keeps the damaged one as step-00000002.damaged." in warning
    assert step == 1
    run.train(2)
    _, older = resumed(folder.with_name("older"))
    assert_same(run.state(), older.train(2).state())

    checkpoints = Checkpoints(folder)  # the run saves the step again
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    checkpoints.wait()
    assert names(folder) == ["step-00000001", "step-00000002", "step-00000002.damaged"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Checkpoints(folder).latest() == 2


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_loaded(folder: Path, damage: str, file: str) -> None:
    DAMAGES[damage](folder / "step-00000002" / file)
    run = Run()
    with pytest.raises(TrainingCheckpointError, match=r"step-00000002 cannot be loaded: .*go on from step 1\.$"):
        Checkpoints(folder).load(2, run.model, run.optimizer, run.extra)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_converted(folder: Path, capsys, damage: str, file: str) -> None:
    step, converted = folder / "step-00000002", folder.with_name("hf")
    DAMAGES[damage](step / file)
    assert main(["to-hf", str(step), str(converted)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{step} has changed since checksums.json was written: " in error
    assert file in error
    assert not converted.exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damaged_files_of_a_run(folder: Path, capsys, damage: str) -> None:
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 files: 8 OK."
    assert lines[0] == "OK: step-00000001/.metadata"
    DAMAGES[damage](folder / "step-00000002" / "__0_0.distcp")
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    state = "missing" if damage == "deleted" else "damaged"
    assert any(line.startswith(f"{state}: step-00000002/__0_0.distcp ") for line in lines)
    assert lines[-1] == f"8 files: {6 if damage == 'swapped' else 7} OK, {2 if damage == 'swapped' else 1} {state}."
    with pytest.warns(UserWarning, match="step 2"):
        Checkpoints(folder).latest()
    assert main(["verify", str(folder)]) == 0  # the run goes on without the damaged checkpoint


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_without_an_undamaged_checkpoint_the_run_does_not_begin_again(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    for step in ("step-00000001", "step-00000002"):
        damage(folder / step / "__0_0.distcp")
    before = names(folder)
    with pytest.raises(TrainingCheckpointError, match=r"has no undamaged checkpoint: step 2: __0_0.* step 1: __0_0"):
        Checkpoints(folder).latest()
    assert names(folder) == before


def test_damaged_checksums_are_damage_and_further_files_are_not(folder: Path) -> None:
    (folder / "step-00000002" / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(folder)[0] == 2
    truncate(folder / "step-00000002" / "checksums.json")
    with pytest.warns(UserWarning, match="step 2: checksums.json is damaged"):
        assert resumed(folder)[0] == 1


def test_a_checkpoint_of_an_older_version_is_taken_with_one_warning(folder: Path) -> None:
    for step in ("step-00000001", "step-00000002"):
        (folder / step / "checksums.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002 has no checksums\.json, as older versions") as caught:
        assert resumed(folder)[0] == 2
    assert len(caught) == 1
    delete(folder / "step-00000002" / ".metadata")
    with pytest.warns(UserWarning, match=r"step 2: \.metadata is missing\. The run goes on from step 1"):
        assert resumed(folder)[0] == 1


def test_a_checkpoint_that_the_machine_cannot_read_is_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "__0_0.distcp")

    monkeypatch.setattr(checkpoints_module, "file_problem", refuse)
    with pytest.raises(TrainingCheckpointError, match=r"step-00000002 cannot be read: PermissionError: .*denied"):
        Checkpoints(folder).latest()
    assert names(folder) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_stays_while_it_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program that begins while another one saves."""
    other, run = Checkpoints(folder, keep=1, asynchronous=False), Run()

    def save_meanwhile(*args: Any) -> str | None:
        if not (folder / "step-00000003").exists():
            other.save(3, run.model, run.optimizer)
        return file_problem(*args)

    monkeypatch.setattr(checkpoints_module, "file_problem", save_meanwhile)
    assert Checkpoints(folder).latest() == 2
    other.save(4, run.model, run.optimizer)
    assert names(folder) == ["step-00000004"]


def test_a_lost_write_is_an_error_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network disk that loses the end of a file without an error."""
    run, checkpoints = Run(), Checkpoints(tmp_path)
    finish = Checkpoints._finish

    def lose(self, step, checksums):
        truncate(self._partial(step) / "__0_0.distcp")
        finish(self, step, checksums)

    monkeypatch.setattr(Checkpoints, "_finish", lose)
    checkpoints.save(1, run.model, run.optimizer)
    with pytest.raises(TrainingCheckpointError, match=r"step 1 cannot be saved .* bytes after \d+ were written"):
        checkpoints.wait()
    assert names(tmp_path) == []


def test_the_command_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, capsys) -> None:
    """Losses and metrics are those of a run that never stopped."""
    source = training_runs.write(tmp_path, training_runs.docstrings(200))
    changes = {"steps": 6, "checkpoint__interval": 2, "data__tokens_per_batch": 256}
    whole = training_runs.train(tmp_path / "whole", source, **changes)
    run = tmp_path / "run"
    training_runs.train(run, source, **changes)
    flip_and_keep_the_time(run / "checkpoints" / "step-00000006" / "__0_0.distcp")
    with (run / "metrics.jsonl").open("r+b") as file:
        file.write(bytes(10))  # a block that the disk has lost
    with pytest.warns(UserWarning, match="goes on from step 4") as caught:
        assert training_runs.main(training_runs.options(run, source, **changes)) == 0
    assert [row["loss"] for row in training_runs.metrics(run)] == whole[1:]
    assert any("metrics.jsonl has damaged lines, which are dropped: 1." in str(each.message) for each in caught)
    for step in ("step-00000002", "step-00000004"):
        flip(run / "checkpoints" / step / "__0_0.distcp")
    flip(run / "checkpoints" / "step-00000006" / ".metadata")
    capsys.readouterr()
    assert training_runs.main(training_runs.options(run, source, **changes)) == 1
    assert "has no undamaged checkpoint: step 6: .metadata has other bytes" in capsys.readouterr().err


def test_a_run_does_not_begin_from_a_damaged_checkpoint(folder: Path, tmp_path: Path, capsys) -> None:
    te, source = tmp_path / "te", training_runs.write(tmp_path, training_runs.docstrings(200))
    assert main(["to-hf", str(folder / "step-00000002"), str(tmp_path / "hf")]) == 0
    assert main(["to-te", str(tmp_path / "hf"), str(te)]) == 0
    flip(te / "model.safetensors")
    changes = {"model__shape": None, "model__checkpoint": te, "data__sequence_length": 32, "steps": 1}
    assert training_runs.main(training_runs.options(tmp_path / "run", source, **changes)) == 1
    error = capsys.readouterr().err
    assert f"model.checkpoint='{te}' has changed since checksums.json was written: model.safetensors has other" in error


@pytest.mark.fuzz
def test_flipped_bits_are_always_noticed(folder: Path, counts: Callable[[str], None]) -> None:
    """In any file of a checkpoint, at a place that is random among all its bytes."""
    source, step = random.Random(0), folder / "step-00000002"
    contents = {path: path.read_bytes() for path in step.iterdir()}
    tries = 300 * fuzzing.ROUNDS
    for _ in range(tries):
        (path,) = source.sample(list(contents), 1, counts=[len(each) for each in contents.values()])
        bit = source.randrange(8 * len(contents[path]))
        damaged = bytearray(contents[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        run = Run.__new__(Run)
        with pytest.raises(TrainingCheckpointError, match="step-00000002 cannot be loaded"):
            Checkpoints(folder).load(2, run, None)  # refused before the model is looked at
        path.write_bytes(contents[path])
    for bit in range(8 * len(contents[step / "checksums.json"])):
        damaged = bytearray(contents[step / "checksums.json"])
        damaged[bit // 8] ^= 1 << bit % 8
        (step / "checksums.json").write_bytes(damaged)
        with pytest.raises(TrainingCheckpointError, match="checksums.json is damaged"):
            Checkpoints(folder, asynchronous=False).load(2, run, None)
    counts(f"a training checkpoint: {tries} flipped bits, all noticed; {bit + 1} in checksums.json, all noticed")
