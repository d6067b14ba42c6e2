"""Runs that save again and again until they are killed. test_train_checkpoints.py starts this program.

Arguments: the moments of the kills, and a folder. The program prints a line for each run. With "at random moments" the
line has the latest checkpoint's step, and whether an unfinished checkpoint is left. With "before each change" it has
the steps of the checkpoints that are left.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.train.checkpoint.checkpoints import Checkpoints

CONFIG = NVLlamaConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    layer_implementation="reference",
)


class Run:
    """A run whose weights and optimizer state all equal the number of the step."""

    def __init__(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(folder, keep=2)
        self.model = NVLlamaForCausalLM(CONFIG)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=1e-30)

    def save(self, step: int) -> None:
        for parameter in self.model.parameters():
            parameter.data.fill_(step)
            parameter.grad = torch.full_like(parameter, step)
        self.optimizer.step()
        self.checkpoints.save(step, self.model, self.optimizer, {"step": step})

    def check(self) -> None:
        """Check that every checkpoint is complete, and that all its values come from one step."""
        for step in self.checkpoints.steps():
            extra = {"step": None}
            self.checkpoints.load(step, self.model, self.optimizer, extra)
            assert extra["step"] == step
            for parameter in self.model.parameters():
                assert bool((parameter == step).all()), step
                assert bool((self.optimizer.state[parameter]["momentum_buffer"] == step).all()), step


def in_a_process(action: Callable[..., None], *arguments: Any) -> int:
    """Begin an action in a fork of this process. This process runs nothing that a fork could not continue."""
    child = os.fork()
    if child == 0:
        try:
            action(*arguments)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return child


def assert_whole(folder: Path) -> None:
    _, status = os.waitpid(in_a_process(lambda: Run(folder).check()), 0)
    assert status == 0


def found(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-????????"))


def save_for_ever(folder: Path, began: int) -> None:
    run = Run(folder)
    step = run.checkpoints.latest() or 0
    while True:
        step += 1
        run.save(step)
        os.write(began, b".")
        time.sleep(random.choice([0, 0, 0.005]))


def at_random_moments(folder: Path) -> None:
    moments = random.Random(0)
    for _ in range(10):
        read, write = os.pipe()
        child = in_a_process(save_for_ever, folder, write)
        os.close(write)
        assert os.read(read, 1) == b"."
        time.sleep(moments.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        unfinished = any(folder.glob("*.partial"))
        assert_whole(folder)
        print(max(found(folder), default=0), unfinished)


def save_two(folder: Path) -> None:
    run = Run(folder)
    for step in (1, 2):
        run.save(step)
    run.checkpoints.wait()


def save_a_third(folder: Path, changes: int) -> None:
    run = Run(folder)
    left = changes

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
    run.save(3)
    run.checkpoints.wait()


def before_each_change(folder: Path) -> None:
    before = folder / "before"
    os.waitpid(in_a_process(save_two, before), 0)
    (before / "step-00000009.partial").mkdir()
    for changes in itertools.count():
        run = folder / str(changes)
        shutil.copytree(before, run)
        _, status = os.waitpid(in_a_process(save_a_third, run, changes), 0)
        assert_whole(run)
        print(*found(run))
        if status == 0:
            return
        assert status == signal.SIGKILL


if __name__ == "__main__":
    {"at random moments": at_random_moments, "before each change": before_each_change}[sys.argv[1]](Path(sys.argv[2]))
