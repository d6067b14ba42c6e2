"""Damaged bytes for the readers of foreign files, each read under a limit of time and of memory."""

from __future__ import annotations

import gc
import os
import random
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# `nox -s fuzz` sets a larger number.
ROUNDS = int(os.environ.get("LLAMA_TE_FUZZ_ROUNDS", "1"))
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def damaged(seed: bytes, source: random.Random) -> bytes:
    """Return the bytes with one to four random changes: flipped bits, extreme numbers, cuts, repetitions, noise."""
    content = bytearray(seed)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(content) + 1)
        length = source.choice((1, 2, 4, 8, 64, 1024))
        match source.randrange(6):
            case 0:
                if place < len(content):
                    content[place] ^= 1 << source.randrange(8)
            case 1:
                if place < len(content):
                    content[place] = source.randrange(256)
            case 2:
                width = source.choice((1, 2, 4, 8))
                content[place : place + width] = (source.choice(_EXTREMES) % 256**width).to_bytes(width, "little")
            case 3:
                del content[place : place + length]
            case 4:
                content[place:place] = content[place : place + length] * source.randint(1, 3)
            case 5:
                content[place:place] = source.randbytes(length)
    if source.random() < 0.1:
        del content[source.randrange(len(content) + 1) :]
    return bytes(content)


@dataclass(frozen=True)
class FuzzCounts:
    """What became of the damaged files."""

    accepted: int
    refused: int
    slowest_seconds: float
    megabytes: float

    def __str__(self) -> str:
        return (
            f"{self.accepted + self.refused} damaged files, {self.refused} refused, {self.accepted} read; "
            f"the slowest took {self.slowest_seconds:.2f} s, and memory grew by {self.megabytes:.0f} MB"
        )


def fuzz(
    read: Callable[[bytes], object],
    seeds: Sequence[bytes],
    folder: Path,
    *,
    refusals: tuple[type[BaseException], ...],
    cases: int,
    seconds: float = 5,
    megabytes: int = 256,
    damage: Callable[[bytes, random.Random], bytes] = damaged,
) -> FuzzCounts:
    """Let a child process read the seeds as they are, which must succeed, and `cases * ROUNDS` damaged ones.

    Args:
        read: It reads the content of a file.
        seeds: Whole files; they are damaged in turns.
        folder: The file that failed is kept here, as `damaged`.
        refusals: Errors that a damaged file may raise.
        cases: Damaged files in one round.
        seconds: Limit of the time of one file.
        megabytes: Limit by which the memory of the child process may grow.
        damage: It damages a seed.

    Raises:
        AssertionError: A file crashed or hung the child process, took too much memory, or raised another error; or a
            seed could not be read.
    """
    total = len(seeds) + cases * ROUNDS

    def case(number: int) -> bytes:
        if number < len(seeds):
            return seeds[number]
        return damage(seeds[number % len(seeds)], random.Random(number))

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # it must never return into pytest
        status = 1
        try:
            os.close(reading)
            gc.freeze()  # each collection would look at all that pytest has loaded
            resident = _size("VmRSS")
            limit = _size("VmSize") + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for number in range(total):
                content = case(number)
                answer, trace = b"+", ""
                try:
                    read(content)
                except BaseException as error:
                    refused = isinstance(error, refusals) and number >= len(seeds)
                    answer, trace = (b"-", "") if refused else (b"!", traceback.format_exc())
                if trace:
                    (folder / "traceback").write_text(trace)
                os.write(writing, answer)
                if trace:
                    break
            (folder / "peak").write_text(str(max(0, _size("VmHWM") - resident) / 2**20))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    answers, slowest = bytearray(), 0.0
    problem = ""
    try:
        while len(answers) < total and not problem:
            begin = time.monotonic()
            ready, _, _ = select.select([reading], [], [], seconds)
            answer = os.read(reading, 1) if ready else b"?"
            slowest = max(slowest, time.monotonic() - begin)
            answers += answer or b"."
            problem = {b"?": f"took more than {seconds} s", b"": "ended the process", b"!": "failed"}.get(answer, "")
    finally:
        if problem.startswith("took"):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(reading)
    if problem:
        number = len(answers) - 1
        (folder / "damaged").write_bytes(case(number))
        trace = folder / "traceback"
        raise AssertionError(
            f"Case {number}, kept as {folder / 'damaged'}, {problem} (wait status {status}).\n"
            + (trace.read_text() if trace.exists() else "")
        )
    grown = float((folder / "peak").read_text())
    assert answers[: len(seeds)] == b"+" * len(seeds)
    rest = answers[len(seeds) :]
    return FuzzCounts(rest.count(b"+"), rest.count(b"-"), slowest, grown)


def _size(field: str) -> int:
    """A size of this process in bytes, from /proc."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
