"""Checkpoints of a training run in one process: a resumed run equals an unbroken run, and checkpoints are complete."""

from __future__ import annotations

import collections
import errno
import io
import os
import pickle
import random
import re
import shutil
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import hostile_pickles
from convert.malicious import Malicious
from core.fake_transformer_engine import DelayedScaling, FakeTransformerEngine
from core.full_disk import full_disk
from fuzzing import fuzz
from llama_te_convert import convert_llama_te_to_hf
from llama_te_convert.cli import main
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.checkpoint_format import CHECKSUMS
from llama_te_core.train.checkpoint import checkpoints as module
from llama_te_core.train.checkpoint.checkpoints import Checkpoints, TrainingCheckpointError
from llama_te_core.train.checkpoint.storage import Reader

TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.1,  # so that a step needs the random numbers that it would have had
}


class Run:
    """A training run. Each new object starts with the same weights."""

    def __init__(self, optimizer_class=torch.optim.AdamW, options=None, **fields) -> None:
        torch.manual_seed(0)
        fields = {**TINY, "layer_implementation": "reference", **fields}
        self.model = NVLlamaForCausalLM(NVLlamaConfig(**fields)).train()
        self.optimizer = optimizer_class(self.model.parameters(), lr=1e-2, **(options or {}))
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, 10)

    @property
    def extra(self):
        return {"scheduler": self.scheduler}

    def compute_gradients(self) -> None:
        ids_BS = torch.randint(3, TINY["vocab_size"], (2, 8))
        self.model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), labels=ids_BS).loss.backward()

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.compute_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def state(self) -> list:
        return [self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]


def assert_same(a, b, where="") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where} {index}")
    else:
        assert a == b, where


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, steps, asynchronous):
    undisturbed = Run().train(steps + 3).state()
    run = Run().train(steps)
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(steps, run.model, run.optimizer, run.extra)
    assert_same(run.train(3).state(), undisturbed)
    checkpoints.wait()

    resumed = Run()
    Checkpoints(tmp_path).load(steps, resumed.model, resumed.optimizer, resumed.extra)
    assert_same(resumed.train(3).state(), undisturbed)


def test_files_are_read_into_host_memory_whatever_the_default_device_is(tmp_path):
    """A tensor on "meta", in place of a GPU, holds no bytes that reading could fill."""
    run, resumed = Run().train(2), Run()
    with torch.device("meta"):
        Checkpoints(tmp_path, asynchronous=False).save(2, run.model, run.optimizer, run.extra)
    expected = run.train(3).state()
    with torch.device("meta"):
        Checkpoints(tmp_path).load(2, resumed.model, resumed.optimizer, resumed.extra)
    assert_same(resumed.train(3).state(), expected)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    ],
    ids=["no state", "momentum", "amsgrad", "adagrad"],
)
def test_optimizers(tmp_path, optimizer_class, options):
    run = Run(optimizer_class, options).train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    run.train(2)
    resumed = Run(optimizer_class, options)
    checkpoints.load(2, resumed.model, resumed.optimizer, resumed.extra)
    assert_same(resumed.train(2).state(), run.state())


def test_a_parameter_without_state_has_none_afterwards(tmp_path):
    run = Run()
    run.model.model.norm.weight.requires_grad_(False)
    run.train(2)
    run.model.model.norm.weight.requires_grad_(True)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    run.train(2)
    resumed = Run()
    checkpoints.load(2, resumed.model, resumed.optimizer, resumed.extra)
    assert resumed.model.model.norm.weight not in resumed.optimizer.state
    assert_same(resumed.train(2).state(), run.state())


def test_tied_embeddings(tmp_path):
    run = Run(tie_word_embeddings=True).train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    run.train(2)
    resumed = Run(tie_word_embeddings=True)
    checkpoints.load(2, resumed.model, resumed.optimizer, resumed.extra)
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    assert_same(resumed.train(2).state(), run.state())


def test_a_run_goes_back(tmp_path):
    """The run loads an earlier checkpoint in the same process, with gradients and an optimizer in use."""
    run = Run().train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    expected = [{name: value.clone() for name, value in run.train(2).model.state_dict().items()}]
    run.train(1)
    run.compute_gradients()
    checkpoints.load(2, run.model, run.optimizer, run.extra)
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert_same([run.train(2).model.state_dict()], expected)


def test_a_parameter_that_this_run_has_not_trained_gets_its_state(tmp_path):
    run = Run().train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    run.train(2)
    other = Run()
    other.model.model.norm.weight.requires_grad_(False)
    other.train(1)
    other.model.model.norm.weight.requires_grad_(True)
    checkpoints.load(2, other.model, other.optimizer, other.extra)
    assert_same(other.train(2).state(), run.state())


def test_all_random_numbers_go_on(tmp_path):
    run = Run()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    expected = random.random(), np.random.random(), torch.rand(3).tolist()
    checkpoints.load(1, run.model, run.optimizer)
    assert (random.random(), np.random.random(), torch.rand(3).tolist()) == expected


def test_random_numbers_of_an_accelerator_go_on(tmp_path, monkeypatch):
    """The copy of the state is also complete before `save` returns."""
    waited = []

    class Accelerator:
        state = torch.tensor([7])

        def get_rng_state(self):
            return self.state.clone()

        def set_rng_state(self, state):
            self.state = state

    accelerator = Accelerator()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch, "get_device_module", lambda: accelerator)
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    assert waited == [True]
    accelerator.state = torch.tensor([8])
    checkpoints.load(1, run.model, run.optimizer)
    assert accelerator.state.tolist() == [7]
    # A machine without an accelerator loads the checkpoint too.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    accelerator.state = torch.tensor([9])
    checkpoints.load(1, run.model, run.optimizer)
    assert accelerator.state.tolist() == [9]


@pytest.mark.parametrize("steps", [0, 1])
def test_saving_leaves_a_run_as_it_is(tmp_path, steps):
    """A save between a backward pass and the optimizer's step does not change the step."""
    runs = [Run().train(steps), Run().train(steps)]
    config = runs[1].model.config.to_dict()
    for run, saves in zip(runs, (False, True), strict=True):
        torch.manual_seed(1)
        run.compute_gradients()
        if saves:
            Checkpoints(tmp_path, asynchronous=False).save(steps, run.model, run.optimizer, run.extra)
        run.optimizer.step()
        run.train(1)
    assert_same(runs[1].state(), runs[0].state())
    assert runs[1].model.config.to_dict() == config


def test_extra_is_loaded_or_replaced(tmp_path):
    run = Run().train(3)
    checkpoints = Checkpoints(tmp_path)
    ema = torch.ones(2)
    checkpoints.save(1, run.model, run.optimizer, {**run.extra, "tokens": 7, "ema": ema})
    ema.zero_()
    expected = run.scheduler.state_dict()
    fresh = Run()
    extra = {"scheduler": fresh.scheduler, "ema": None}
    checkpoints.load(1, fresh.model, extra=extra)
    assert extra == {"scheduler": fresh.scheduler, "ema": extra["ema"]}
    assert extra["ema"].tolist() == [1, 1]
    assert fresh.scheduler.state_dict() == expected
    assert not fresh.optimizer.state


def test_a_compiled_model_is_the_same_model(tmp_path):
    run = Run().train(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, torch.compile(run.model), run.optimizer)
    resumed = Run().train(3)
    checkpoints.load(1, torch.compile(resumed.model), resumed.optimizer)
    assert_same(resumed.state()[:1], run.state()[:1])


def groups(run: Run) -> list[dict]:
    return [{key: value for key, value in each.items() if key != "params"} for each in run.optimizer.param_groups]


def test_options_are_those_of_the_run_that_goes_on(tmp_path):
    """The learning rate is the exception, since a scheduler computes it from the last rate."""
    run = Run(options={"weight_decay": 0.1}).train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    options = {"betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.3}
    resumed = Run(options=options)
    checkpoints.load(2, resumed.model, resumed.optimizer, resumed.extra)
    assert groups(resumed) == [each | options for each in groups(run)]
    assert resumed.optimizer.param_groups[0]["lr"] != Run().optimizer.param_groups[0]["lr"]
    assert_same(resumed.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"])
    # As if they had been changed in the run that was saved.
    for group in run.optimizer.param_groups:
        group.update(options)
    torch.manual_seed(1)
    run.train(2)
    torch.manual_seed(1)
    assert_same(resumed.train(2).state(), run.state())


def test_options_stay_with_their_groups(tmp_path):
    run = Run()
    first, *others = run.model.parameters()

    def optimizer(decay):
        return torch.optim.AdamW([{"params": [first], "weight_decay": decay}, {"params": others}], weight_decay=0.0)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, optimizer(0.1))
    again = optimizer(0.2)
    checkpoints.load(1, run.model, again)
    assert [group["weight_decay"] for group in again.param_groups] == [0.2, 0.0]


def test_a_scheduler_that_moves_betas_goes_on(tmp_path):
    def new():
        run = Run()
        run.scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=1e-2, total_steps=10)
        return run

    run = new().train(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, run.model, run.optimizer, run.extra)
    resumed = new()
    assert groups(resumed)[0]["betas"] != groups(run)[0]["betas"]
    checkpoints.load(2, resumed.model, resumed.optimizer, resumed.extra)
    torch.manual_seed(1)
    run.train(2)
    torch.manual_seed(1)
    assert_same(resumed.train(2).state(), run.state())


# --- converting -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_converts(tmp_path):
    run = Run().train(2)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1200, run.model, run.optimizer, run.extra)
    checkpoints.wait()
    assert main(["to-hf", str(tmp_path / "run" / "step-00001200"), str(tmp_path / "hf")]) == 0
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.architectures, config.dtype) == (["LlamaForCausalLM"], torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(converted, LlamaForCausalLM)
    assert_same(converted.state_dict(), convert_llama_te_to_hf(run.model).state_dict())


# --- in the background ------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    released = threading.Event()
    usual = module.state_dict_saver.save

    def wait_and_save(*args, **kwargs):
        assert released.wait(timeout=60)
        return usual(*args, **kwargs)

    monkeypatch.setattr(module.state_dict_saver, "save", wait_and_save)
    run = Run().train(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer, run.extra)
    run.train(3)
    assert names(tmp_path) == ["step-00000001.partial"]
    released.set()
    assert checkpoints.steps() == [1]

    resumed = Run()
    checkpoints.load(1, resumed.model, resumed.optimizer, resumed.extra)
    assert_same(resumed.train(3).state(), run.state())


def test_saves_in_quick_succession(tmp_path):
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    expected = {}
    for step in (1, 2, 3):
        expected[step] = {name: value.clone() for name, value in run.train(1).model.state_dict().items()}
        checkpoints.save(step, run.model, run.optimizer)
    assert checkpoints.steps() == [1, 2, 3]
    for step in (1, 2, 3):
        checkpoints.load(step, run.model)
        assert_same(run.model.state_dict(), expected[step])


def test_an_error_of_the_background_comes_with_the_next_call_once(tmp_path):
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    checkpoints.wait()
    for call in (checkpoints.wait, checkpoints.latest, lambda: checkpoints.save(3, run.model, run.optimizer)):
        with full_disk():
            checkpoints.save(2, run.model, run.optimizer)
            with pytest.raises(TrainingCheckpointError, match="step 2 cannot be saved"):
                call()
        assert checkpoints.latest() == 1
    checkpoints.save(2, run.model, run.optimizer)
    assert checkpoints.steps() == [1, 2]


# --- whole checkpoints only -------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_error(tmp_path):
    run = Run()
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    with full_disk(), pytest.raises(TrainingCheckpointError) as caught:
        checkpoints.save(5, run.model, run.optimizer)
    assert re.fullmatch(
        rf"step 5 cannot be saved to {tmp_path}: the disk is full \(rank 0\): make room, or keep fewer checkpoints "
        r"\(a checkpoint has 0\.00 GB, and [\d.]+ GB are free\)\. There is no checkpoint yet\.",
        str(caught.value),
    )
    assert names(tmp_path) == []  # the failed save leaves no files
    checkpoints.save(5, run.model, run.optimizer)
    with full_disk(), pytest.raises(TrainingCheckpointError, match=r"The last checkpoint is of step 5\.$"):
        checkpoints.save(6, run.model, run.optimizer)
    assert names(tmp_path) == ["step-00000005"]
    checkpoints.load(5, run.model, run.optimizer)


def test_a_disk_that_is_full_in_the_middle_of_a_tensor(tmp_path):
    """Here torch.save hides the disk's error behind its own."""
    run = Run(hidden_size=256)
    with full_disk(100_000), pytest.raises(TrainingCheckpointError, match=r"the disk is full \(rank 0\): make room"):
        Checkpoints(tmp_path, asynchronous=False).save(1, run.model, run.optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_disk_that_is_full_before_or_after_the_tensors(tmp_path, monkeypatch, when):
    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "before":
        monkeypatch.setattr(NVLlamaConfig, "save_pretrained", refuse)
    else:
        monkeypatch.setattr(module, "sync", refuse)
    run = Run()
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    with pytest.raises(TrainingCheckpointError, match="step 5 cannot be saved .* the disk is full: make room"):
        checkpoints.save(5, run.model, run.optimizer)
    monkeypatch.undo()
    assert checkpoints.latest() is None
    checkpoints.save(5, run.model, run.optimizer)
    assert checkpoints.latest() == 5


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    run = Run()
    checkpoints = Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(
        TrainingCheckpointError, match="step 1 cannot be saved .* NotADirectoryError: .*Not a directory"
    ):
        checkpoints.save(1, run.model, run.optimizer)


def test_the_oldest_make_room(tmp_path):
    run = Run()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "step-9").mkdir()  # not a checkpoint's name
    checkpoints = Checkpoints(tmp_path, keep=2)
    found = []
    for step in (1, 5, 20, 300):
        checkpoints.save(step, run.model, run.optimizer)
        found.append(checkpoints.steps())
    assert found == [[1], [1, 5], [5, 20], [20, 300]]
    assert names(tmp_path) == ["notes.txt", "step-00000020", "step-00000300", "step-9"]
    alone = Checkpoints(tmp_path, keep=1)
    alone.save(10**9, run.model, run.optimizer)  # more digits than a name has at least
    assert alone.steps() == [10**9]
    alone.load(10**9, run.model, run.optimizer)


def test_the_oldest_can_be_removed_without_a_save(tmp_path):
    """A process that is killed between a save and the removal leaves one checkpoint more."""
    run = Run()
    before = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        before.save(step, run.model, run.optimizer)
    before.wait()
    after = Checkpoints(tmp_path, keep=1)
    after.remove_old()
    assert after.steps() == [3]
    assert names(tmp_path) == ["step-00000003"]


def test_the_oldest_stay_until_the_new_one_is_whole(tmp_path):
    run = Run()
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=False)
    checkpoints.save(1, run.model, run.optimizer)
    with full_disk(), pytest.raises(TrainingCheckpointError):
        checkpoints.save(2, run.model, run.optimizer)
    assert checkpoints.steps() == [1]
    checkpoints.load(1, run.model, run.optimizer)


def test_a_checkpoint_that_cannot_be_removed(tmp_path, monkeypatch):
    """The new checkpoint is complete, and the old one no longer counts as a checkpoint."""
    run = Run()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, run.model, run.optimizer)
    checkpoints.wait()

    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    checkpoints.save(2, run.model, run.optimizer)
    with pytest.raises(
        TrainingCheckpointError, match=r"step-00000001 cannot be removed: PermissionError: .*Permission denied"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == [2]
    assert names(tmp_path) == ["step-00000001.partial", "step-00000002"]
    checkpoints.save(3, run.model, run.optimizer)
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000003"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    usual_fsync, usual_rename = os.fsync, Path.rename

    def fsync(file):
        events.append(os.readlink(f"/proc/self/fd/{file}"))
        usual_fsync(file)

    def rename(path, target):
        if path.suffix == ".partial":
            events.append("rename")
            assert {path.name, *(f"{path.name}/{each}" for each in names(path))} <= {
                str(Path(event).relative_to(tmp_path)) for event in events[:-1]
            }
        return usual_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    run = Run()
    Checkpoints(tmp_path, asynchronous=False).save(1, run.model, run.optimizer)
    assert events[-2:] == ["rename", str(tmp_path)]
    assert {".metadata", "__0_0.distcp", "config.json"} <= set(names(tmp_path / "step-00000001"))


def test_leftovers_are_removed_by_the_next_save(tmp_path):
    leftover = tmp_path / "step-00000007.partial"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    assert leftover.exists()
    checkpoints.save(7, run.model, run.optimizer)
    assert checkpoints.steps() == [7]
    checkpoints.load(7, run.model, run.optimizer)
    assert names(tmp_path) == ["step-00000007"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_is_checked(tmp_path, keep):
    with pytest.raises(ValueError, match=r"keep=.*: it must be an integer of at least 1"):
        Checkpoints(tmp_path, keep=keep)


def test_a_missing_step_names_those_there_are(tmp_path):
    run = Run()
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(TrainingCheckpointError, match="run has no checkpoint of step 3: there is none"):
        checkpoints.load(3, run.model)
    for step in (1, 2):
        checkpoints.save(step, run.model, run.optimizer)
    with pytest.raises(TrainingCheckpointError, match="run has no checkpoint of step 3: there are 1, 2"):
        checkpoints.load(3, run.model)


@pytest.mark.parametrize("step", [4, 5, -1, 6.0, True])
def test_steps_go_up(tmp_path, step):
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, run.model, run.optimizer)
    with pytest.raises(ValueError, match=r"step=.*: it must be an integer larger than 5, since .*step-00000005 exists"):
        checkpoints.save(step, run.model, run.optimizer)
    with pytest.raises(ValueError, match=r"step=-1: it must be an integer larger than -1\."):
        Checkpoints(tmp_path / "new").save(-1, run.model, run.optimizer)
    assert names(tmp_path) == ["step-00000005"]


def test_other_models_are_refused(tmp_path):
    layer = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TypeError, match="model is a Linear: it must be a model of transformers"):
        checkpoints.save(1, layer, torch.optim.SGD(layer.parameters()))


def test_a_checkpoint_that_does_not_fit(tmp_path):
    run = Run().train(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer, run.extra)
    with pytest.raises(
        TrainingCheckpointError, match=r"step-00000001 cannot be loaded: RuntimeError: Missing key .*layers\.2"
    ):
        checkpoints.load(1, Run(num_hidden_layers=3).model)
    with pytest.raises(TrainingCheckpointError, match=r"cannot be loaded: ValueError: Size mismatch .*mlp"):
        checkpoints.load(1, Run(intermediate_size=32).model)
    momentum = Run(torch.optim.SGD, {"momentum": 0.9})
    with pytest.raises(TrainingCheckpointError, match=r"cannot be loaded: RuntimeError: Missing key .*momentum_buffer"):
        checkpoints.load(1, momentum.model, momentum.optimizer)
    first, *others = run.model.parameters()
    groups = torch.optim.AdamW([{"params": [first], "weight_decay": 0.0}, {"params": others}])
    with pytest.raises(
        TrainingCheckpointError, match=r"optimizer has groups of \[1, 14\] parameters, .* groups of \[15\]"
    ):
        checkpoints.load(1, run.model, groups)
    with pytest.raises(TrainingCheckpointError, match="extra has 'data', but the checkpoint has 'scheduler' as extra"):
        checkpoints.load(1, run.model, run.optimizer, {"data": None})
    checkpoints.save(2, run.model, run.optimizer)
    with pytest.raises(TrainingCheckpointError, match="extra has 'data', but the checkpoint has nothing as extra"):
        checkpoints.load(2, run.model, run.optimizer, {"data": None})


@pytest.mark.parametrize(
    ("file", "size", "what"),
    [
        (".metadata", 1000, r"\.metadata is damaged: it ends within .*"),
        (".metadata", 0, r"\.metadata is damaged: it has no end"),
        (".metadata", None, r"\.metadata is missing"),
        (
            "__0_0.distcp",
            1000,
            r"__0_0\.distcp is not complete: it has 1000 bytes, but byte \d+ is asked for \(rank 0\)",
        ),
        ("__0_0.distcp", None, r"__0_0\.distcp is missing \(rank 0\)"),
    ],
)
def test_a_damaged_checkpoint(tmp_path, file, size, what):
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(60, run.model, run.optimizer)
    checkpoints.save(80, run.model, run.optimizer)
    checkpoints.wait()
    (tmp_path / "step-00000080" / "checksums.json").unlink()  # as an older version saved it
    path = tmp_path / "step-00000080" / file
    data = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(data[:size])
    damaged = f"{path.parent} cannot be loaded: {what}\\. Remove {path.parent} to "
    with pytest.raises(TrainingCheckpointError, match=damaged + r"go on from step 60\.$"):
        checkpoints.load(80, run.model, run.optimizer)
    shutil.rmtree(tmp_path / "step-00000060")
    with pytest.raises(TrainingCheckpointError, match=damaged + r"begin again\.$"):
        checkpoints.load(80, run.model, run.optimizer)


def test_a_checkpoint_that_the_machine_cannot_read_is_not_called_damaged(tmp_path, monkeypatch):
    run = Run()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    checkpoints.wait()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Reader, "_read", refuse)
    message = r"step-00000001 cannot be loaded: PermissionError: .*Permission denied \(rank 0\)\.$"
    with pytest.raises(TrainingCheckpointError, match=message):
        checkpoints.load(1, run.model, run.optimizer)


# --- code in checkpoints ----------------------------------------------------------------------------------------------


def a_checkpoint(folder, monkeypatch=None, to_bytes=None):
    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        if to_bytes is not None:
            patch.setattr(module, "to_bytes", to_bytes)
        Checkpoints(folder, asynchronous=False).save(1, run.model, run.optimizer)
    (folder / "step-00000001" / CHECKSUMS).unlink()  # who writes a hostile checkpoint writes fitting checksums
    return folder / "step-00000001"


@pytest.mark.parametrize("attack", hostile_pickles.attacks(Path("/nonexistent")))
def test_hostile_metadata(tmp_path, attack):
    trace = tmp_path / "was_run"
    path = a_checkpoint(tmp_path) / ".metadata"
    run = Run()

    def read(content):
        path.write_bytes(content)
        Checkpoints(tmp_path, asynchronous=False).load(1, run.model, run.optimizer)

    content = hostile_pickles.attacks(trace)[attack]
    hostile_pickles.assert_harmless(read, path.read_bytes(), content, tmp_path, TrainingCheckpointError)
    assert not trace.exists()


@pytest.mark.parametrize("wrapped", [True, False], ids=["in bytes", "as a value"])
def test_code_in_values_is_not_run(tmp_path, wrapped):
    trace = tmp_path / "was_run"

    def evil(value):
        buffer = io.BytesIO()
        torch.save(Malicious(trace), buffer)
        return buffer.getvalue() if wrapped else Malicious(trace)

    a_checkpoint(tmp_path, to_bytes=evil)
    run = Run()
    message = r"is refused: it asks for \w+\.mkdir, which such files do not need and which could run any code"
    with pytest.raises(TrainingCheckpointError, match=message):
        Checkpoints(tmp_path).load(1, run.model, run.optimizer)
    with pytest.raises(TrainingCheckpointError, match=message):
        Checkpoints(tmp_path).load(1, run.model)
    assert not trace.exists()


def test_code_in_tensors_is_not_run(tmp_path):
    trace = tmp_path / "was_run"
    path = a_checkpoint(tmp_path)
    buffer = io.BytesIO()
    torch.save(Malicious(trace), buffer)
    metadata = FileSystemReader(path).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "evil", 0, len(buffer.getvalue())
    (path / "evil").write_bytes(buffer.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    run = Run()
    with pytest.raises(TrainingCheckpointError, match=r"evil is refused: it asks for \w+\.mkdir"):
        Checkpoints(tmp_path).load(1, run.model, run.optimizer)
    assert not trace.exists()


def test_extra_that_no_checkpoint_can_hold(tmp_path):
    """It is refused before the run depends on it."""
    run = Run()
    with pytest.raises(
        TrainingCheckpointError, match=r"has a pathlib\.\w*Path, which no checkpoint can hold, .*: give"
    ):
        Checkpoints(tmp_path).save(1, run.model, run.optimizer, {"file": Path("a")})
    assert Checkpoints(tmp_path).latest() is None


def test_extra_of_every_kind(tmp_path):
    extra = {
        "numbers": [1, 2.5, 10**30, True, None, 1j],
        "texts": ("a", b"\xff\x00", bytearray(b"b")),
        "tensors": {
            "a": torch.arange(6).view(2, 3).T,
            "b": torch.ones(2, dtype=torch.bfloat16),
            "dtype": torch.float16,
        },
        "arrays": {"a": np.arange(6.0).reshape(2, 3).T, "b": np.float32(0.1), "c": np.array([True, False])},
        "counter": collections.Counter([3, 3, 5]),
        "set": {1, "b"},
        "ordered": collections.OrderedDict(a=1),
    }
    run = Run()
    Checkpoints(tmp_path, asynchronous=False).save(1, run.model, run.optimizer, extra)
    loaded = dict.fromkeys(extra)
    Checkpoints(tmp_path).load(1, run.model, run.optimizer, loaded)
    assert_same(loaded.pop("tensors"), extra.pop("tensors"))
    for name, array in extra.pop("arrays").items():
        assert loaded["arrays"][name].dtype == array.dtype and np.array_equal(loaded["arrays"][name], array)
    del loaded["arrays"]
    assert loaded == extra and list(map(type, loaded.values())) == list(map(type, extra.values()))


@pytest.mark.fuzz
def test_damaged_metadata(tmp_path, counts):
    path = a_checkpoint(tmp_path) / ".metadata"
    run = Run()

    def read(content):
        path.write_bytes(content)
        Checkpoints(tmp_path, asynchronous=False).load(1, run.model, run.optimizer)

    found = fuzz(read, [path.read_bytes()], tmp_path, refusals=(TrainingCheckpointError,), cases=300)
    counts(f"metadata of a training checkpoint: {found}")


@pytest.mark.fuzz
def test_damaged_tensors_and_values(tmp_path, counts):
    checkpoint = a_checkpoint(tmp_path)
    places = sorted(FileSystemReader(checkpoint).read_metadata().storage_data.values(), key=lambda place: place.length)
    place = places[0]  # a small tensor: a random change mostly hits its pickle or directory
    path = checkpoint / place.relative_path
    whole = path.read_bytes()
    run = Run()

    def read(content):
        length = place.length
        path.write_bytes(whole[: place.offset] + content[:length].ljust(length) + whole[place.offset + length :])
        Checkpoints(tmp_path, asynchronous=False).load(1, run.model, run.optimizer)

    seed = whole[place.offset : place.offset + place.length]
    found = fuzz(read, [seed], tmp_path, refusals=(TrainingCheckpointError,), cases=200)
    counts(f"a tensor of a training checkpoint: {found}")


# --- Transformer Engine -----------------------------------------------------------------------------------------------


@pytest.fixture
def te(monkeypatch):
    fake = FakeTransformerEngine()
    fake.install(monkeypatch)
    return fake


def test_scales_of_fp8_go_along(te, tmp_path, monkeypatch):
    """The models' state dict does not contain the scales."""
    recipes = types.SimpleNamespace(DelayedScaling=DelayedScaling)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    run = Run(layer_implementation="transformer_engine")
    assert not any("_extra_state" in name for name in run.model.state_dict())
    first, second = te.layers
    first.fp8_meta["num_gemms"] = 2
    first.init_fp8_meta_tensors(DelayedScaling(amax_history_len=4))
    kept = {}
    for direction in ("fwd", "bwd"):
        tensors = vars(first.fp8_meta[f"scaling_{direction}"])
        kept[direction] = {name: tensor.uniform_().clone() for name, tensor in tensors.items()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, run.model, run.optimizer)
    first.fp8_meta = {}
    checkpoints.load(1, run.model, run.optimizer)
    for direction in ("fwd", "bwd"):
        assert_same(vars(first.fp8_meta[f"scaling_{direction}"]), kept[direction])
    assert first.fp8_meta["recipe"].amax_history_len == 4
    assert second.fp8_meta == {}

    reference = Run()
    checkpoints.load(1, reference.model, reference.optimizer)
    assert_same(reference.model.state_dict(), run.model.state_dict())
    checkpoints.save(2, reference.model, reference.optimizer)
    first.fp8_meta = {}
    checkpoints.load(2, run.model, run.optimizer)
    assert first.fp8_meta == {}


def test_weights_that_exist_quantized_only_are_refused(te, tmp_path):
    with torch.device("meta"):
        run = Run(layer_implementation="transformer_engine", layer_precision=["fp8"] * 2, use_quantized_model_init=True)
    with pytest.raises(ValueError, match="weight is a QuantizedTensor, which .* use_quantized_model_init=False"):
        Checkpoints(tmp_path).save(1, run.model, run.optimizer)
