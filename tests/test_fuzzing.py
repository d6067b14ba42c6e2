"""The fuzzing of the readers sees what it must see."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzzing import ROUNDS, damaged, fuzz

SEEDS = [b"a whole file", b"another one"]


def refuse_others(content: bytes) -> None:
    if content not in SEEDS:
        raise ValueError("damaged")


def test_files_are_damaged_in_many_ways_and_the_same_ones_each_time() -> None:
    files = [damaged(SEEDS[0], random.Random(number)) for number in range(300)]
    assert files == [damaged(SEEDS[0], random.Random(number)) for number in range(300)]
    assert len(set(files)) > 200 and len({len(file) for file in files}) > 20


@pytest.mark.fuzz
def test_it_counts(tmp_path: Path) -> None:
    found = fuzz(refuse_others, SEEDS, tmp_path, refusals=(ValueError,), cases=50)
    assert found.accepted + found.refused == 50 * ROUNDS and found.refused > 40 * ROUNDS
    assert found.megabytes < 50 and found.slowest_seconds < 5


def hang(content: bytes) -> None:
    time.sleep(60)


def crash(content: bytes) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def eat(content: bytes) -> None:
    bytes(2**36)  # more than any memory that the process could have freed before


def fail(content: bytes) -> None:
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (hang, r"took more than 0\.5 s \(wait status 9\)"),
        (crash, r"ended the process \(wait status 11\)"),
        (eat, "MemoryError"),
        (fail, "KeyError: 'a bug'"),
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["damaged file", "whole file"])
def test_it_fails(act: Callable[[bytes], None], message: str, whole: bool, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        if whole or content not in SEEDS:
            act(content)

    with pytest.raises(AssertionError, match=message) as raised:
        fuzz(read, SEEDS, tmp_path, refusals=(ValueError,), cases=50, seconds=20 if act is not hang else 0.5)
    assert ((tmp_path / "damaged").read_bytes() in SEEDS) == whole
    assert "kept as" in str(raised.value)
