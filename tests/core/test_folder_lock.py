"""Locks of folders: one writer, named to the others; readers keep a folder; nothing holds a lock after its process."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from core.training_runs import Command, docstrings, losses, options, train, write
from llama_te_core import NVLlamaConfig, NVLlamaForCausalLM
from llama_te_core.files import folder_lock
from llama_te_core.files.folder_lock import FolderInUseError, FolderLock, lock_beside, reading, removing
from llama_te_core.train.checkpoint.checkpoints import Checkpoints, TrainingCheckpointError
from llama_te_core.train.command import main

CONFIG = NVLlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    layer_implementation="reference",
)  # fmt: skip


@contextmanager
def another_process(action: Callable[[], object]) -> Iterator[int]:
    """A fork that runs the action and then waits; yields its id when the action has ended. It is killed in the end."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kept = action()
            os.write(begun, b".")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    os.close(begun)
    assert os.read(ready, 1) == b".", "the action has failed"
    os.close(ready)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_second_writer_learns_who_the_first_is(tmp_path: Path) -> None:
    with another_process(lambda: FolderLock(tmp_path)) as holder:
        with pytest.raises(FolderInUseError) as caught:
            FolderLock(tmp_path)
        name = f"pid {holder} on host {re.escape(socket.gethostname())} since 20..-..-.. ..:..:.. UTC"
        assert re.fullmatch(
            rf"{tmp_path} is being written by {name} \(.+: wait for it to end, or name another folder\.",
            str(caught.value),
        )
    FolderLock(tmp_path).close()  # the holder was killed


def test_locks_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), pytest.raises(FolderInUseError, match=f"pid {os.getpid()} "):
        FolderLock(tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the lock had made the folder
    with lock_beside(tmp_path / "made" / "te"):
        assert os.listdir(tmp_path / "made") == [".te.lock"]
        (tmp_path / "made" / "te").mkdir()
    assert os.listdir(tmp_path / "made") == ["te"]


def test_a_lock_that_nobody_refers_to_is_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.is_held
    del lock
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_lock_does_not_outlive_its_process_in_a_fork(tmp_path: Path) -> None:
    """Workers of a killed run live on for seconds. Neither they nor their end may touch the lock."""

    def hold_and_fork() -> FolderLock:
        lock = FolderLock(tmp_path)
        if os.fork() == 0:
            (tmp_path / "worker").write_text(str(os.getpid()))
            assert not lock.is_held
            lock.close()
            time.sleep(60)
            os._exit(0)
        while not (tmp_path / "worker").exists():
            time.sleep(0.01)
        return lock

    with another_process(hold_and_fork) as holder:
        with pytest.raises(FolderInUseError, match=f"pid {holder} "):
            FolderLock(tmp_path)
        os.kill(holder, signal.SIGKILL)
        worker = int((tmp_path / "worker").read_text() or 0)
        os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
        os.kill(worker, 0)  # it is alive
        FolderLock(tmp_path).close()
        os.kill(worker, signal.SIGKILL)


def test_a_lock_does_not_outlive_its_process_in_a_program(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        program = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    FolderLock(tmp_path).close()
    program.communicate(b"\n")


def test_many_writers_in_turns_are_never_two(tmp_path: Path) -> None:
    """Each holder removes the lock file, so that others can meet a file that is gone already."""
    inside, most, turns, end = [0], [0], [0], time.monotonic() + 60

    def write_often() -> None:
        own = 0
        while own < 100 and time.monotonic() < end:
            try:
                with lock_beside(tmp_path / "new" / "te"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    turns[0] += 1
                    inside[0] -= 1
                own += 1
            except FolderInUseError:
                pass

    with ThreadPoolExecutor(4) as pool:
        for thread in [pool.submit(write_often) for _ in range(4)]:
            thread.result()
    assert most == [1] and turns[0] == 400


def test_a_folder_that_goes_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, misses = Path.mkdir, [FileExistsError("made by another"), FileNotFoundError("removed by another")]

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        if misses:
            raise misses.pop()
        original(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with lock_beside(tmp_path / "new" / "te"):
        assert not misses


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "another process"), (b"\xff\x1b[2J\0" * 10**6, None), (b"\n\n", "another process")]
)
def test_a_lock_file_of_any_content(tmp_path: Path, content: bytes, said: str | None) -> None:
    with FolderLock(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(FolderInUseError) as caught:
            FolderLock(tmp_path)
    message = str(caught.value).removeprefix(str(tmp_path))
    assert message.isprintable() and len(message) < 500
    assert said is None or f"by {said}:" in message


def test_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        FolderLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_system_without_locks_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder_lock._warn_without_locks.cache_clear()
    with pytest.warns(UserWarning, match=f"the file system of {tmp_path} has no locks"):
        FolderLock(tmp_path).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FolderLock(tmp_path).close()


def test_readers_keep_a_folder(tmp_path: Path) -> None:
    read = pytest.raises(FolderInUseError, match="is being read by another process")
    with reading(tmp_path), reading(tmp_path), read, removing(tmp_path):
        pass
    with removing(tmp_path), pytest.raises(FolderInUseError, match="is being removed or replaced"), reading(tmp_path):
        pass
    with removing(tmp_path), pytest.raises(FolderInUseError), removing(tmp_path):
        pass


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Loop:
    """A loop of somebody's own."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.checkpoints = Checkpoints(folder, keep=keep, asynchronous=False)
        self.model = NVLlamaForCausalLM(CONFIG)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def save(self, step: int) -> Loop:
        self.checkpoints.save(step, self.model, self.optimizer)
        return self


def test_two_loops_do_not_save_to_one_folder(tmp_path: Path) -> None:
    with another_process(lambda: Loop(tmp_path).save(1)) as holder:
        (tmp_path / "step-00000002.partial").mkdir()  # the holder is writing it
        other = Loop(tmp_path)
        with pytest.raises(
            TrainingCheckpointError,
            match=rf"^step 3 cannot be saved: {tmp_path} is being written by pid {holder} on host",
        ):
            other.save(3)
        assert (tmp_path / "step-00000002.partial").exists()
        other.checkpoints.load(1, other.model)  # reading is free
    other.save(3)
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000003"]
    Loop(tmp_path).save(4)  # two objects of one process may take turns
    other.save(5)


def test_a_checkpoint_that_is_read_is_not_removed(tmp_path: Path) -> None:
    loop = Loop(tmp_path).save(1)
    with reading(loop.checkpoints.path(1)):
        loop.save(2)
        assert loop.checkpoints.steps() == [1, 2]
    loop.save(3)
    assert loop.checkpoints.steps() == [3]


# --- the training command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts"), docstrings(60))


def test_two_runs_in_one_folder(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run changes nothing. After SIGKILL the folder is free at once, although workers live on."""
    few = {"checkpoint__interval": 1, "data__tokens_per_batch": 256, "schedule__kind": "constant"}
    settings = few | {"data__workers": 2, "steps": 100_000}
    with Command(tmp_path / "run", options(tmp_path / "run", source, **settings)) as command:
        command.wait_for_step(3)
        (tmp_path / "link").symlink_to(tmp_path / "run")
        for name in ("run", "link"):
            assert main(options(tmp_path / name, source, **settings)) == 1
            said = capsys.readouterr().err
            assert f"{tmp_path / name} is being written by pid {command.process.pid} on host" in said
            assert len(said.splitlines()) == 1
        command.wait_for_step(len(losses(tmp_path / "run")) + 2)  # the first run goes on
        command.process.kill()
        command.process.wait()
    stopped = max(int(each.name[5:]) for each in (tmp_path / "run" / "checkpoints").glob("step-????????"))
    more = train(tmp_path / "run", source, **settings | {"steps": stopped + 2})
    assert more == train(tmp_path / "whole", source, **settings | {"steps": stopped + 2})
    assert not (tmp_path / "run" / ".lock").exists()
