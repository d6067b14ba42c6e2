"""Kills and errors of a disk at any chosen change that a command makes to a folder.

    faults.run("llama_te_convert.cli:main", ["to-te", source, target], folder=folder, at=17, error=errno.ENOSPC)

The command runs in a fork of a server that has everything imported. The server has the library of `faults.c`, which
counts the changes (files created, writes, renames and so on) and lets the one with the number `at` fail, or kill.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_IMPORTED = (
    "llama_te_convert.adapter",
    "llama_te_convert.cli",
    "llama_te_convert.in_memory",
    "llama_te_convert.on_disk",
    "llama_te_convert.targets.standalone",
    "llama_te_core.train.command",
    "llama_te_core.train.loop",
    "safetensors.torch",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: Its exit status; -9 for a killed one.
        said: What it wrote to standard error.
        changes: Each change that it made or tried, such as "rename /te.partial".
    """

    status: int
    said: str
    changes: list[str]

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]


class Faults:
    """The server, started once for all tests of a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        library = folder / "faults.so"
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        paths = os.pathsep.join(path for path in sys.path if path)
        self._server = subprocess.Popen(
            [sys.executable, __file__, library],
            env=os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self._server.communicate("")

    def run(self, action: str, *arguments: Any, folder: Path, at: int = -1, error: int = 0) -> Outcome:
        """Run an action, as "module:function", in a fork.

        Args:
            action: A function, whose result is the exit status; an error is printed, with status 1.
            arguments: JSON types.
            folder: Changes of this folder and below count.
            at: The change that fails; none for -1.
            error: The errno with which it fails; 0 kills the process.
        """
        log, said = self._folder / "log", self._folder / "said"
        request = [action, arguments, str(folder), at, error, str(log), str(said)]
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return Outcome(status, said.read_text(errors="replace"), log.read_text().splitlines())


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    server = Faults(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def disturb(
    run: Callable[[int, int], Outcome],
    places: Sequence[int],
    error_number: int,
    *,
    reset: Callable[[], None],
    check: Callable[[Outcome, bool], None],
    stage: Callable[[str], str],
) -> Counter[str]:
    """Let a command end by an accident at each of some changes, and run it again.

    Args:
        run: Runs the command; its arguments are the number of a change and an errno.
        places: The changes.
        error_number: An errno; 0 for SIGKILL.
        reset: Makes the folder as it was before the command.
        check: Checks the folder after an accident, and (with True) after the next run.
        stage: Names the stage that a change belongs to.

    Returns:
        The number of accidents in each stage.
    """
    stages: Counter[str] = Counter()
    for place in places:
        reset()
        outcome = run(place, error_number)
        if len(outcome.changes) <= place:  # threads make the numbers of changes differ a little
            assert outcome.status == 0, outcome.said
            continue
        stages[stage(outcome.changes[place])] += 1
        if error_number == 0:
            assert outcome.status == -signal.SIGKILL, (place, outcome)
        try:
            check(outcome, False)
            check(run(-1, 0), True)
        except AssertionError as error:
            error.add_note(
                f"after {os.strerror(error_number) if error_number else 'SIGKILL'} at {outcome.changes[place]!r}"
            )
            raise
    return stages


def places(changes: Sequence[str], wanted: int) -> list[int]:
    """Choose changes at random, the last one and the last rename among them."""
    always = {len(changes) - 1, max(place for place, change in enumerate(changes) if change.startswith("rename"))}
    others = [place for place in range(len(changes)) if place not in always]
    return sorted([*always, *random.Random(0).sample(others, min(max(wanted - len(always), 0), len(others)))])


def words(stages: Counter[str]) -> str:
    """Return the counts of stages in words."""
    return ", ".join(f"{count} at {stage}" for stage, count in sorted(stages.items()))


def _child(action: str, arguments: list[Any]) -> int:
    import torch

    torch.set_num_threads(1)
    module, _, name = action.partition(":")
    try:
        return int(getattr(importlib.import_module(module), name)(*arguments) or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _serve(library: str) -> None:
    for each in _IMPORTED:
        importlib.import_module(each)
    begin = ctypes.CDLL(library).faults_begin
    for line in sys.stdin:
        action, arguments, folder, at, error, log, said = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                errors = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                changes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                begin(os.fsencode(folder), ctypes.c_long(at), error, changes)
                status = _child(action, arguments)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
