"""Requests at random times, of which a third lose their client: nothing of them stays, and the others are whole."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import fuzzing
from serving.conftest import RunningServer, children_of, running_command
from serving.test_server import until

PER_SECOND = 60.0


@dataclass
class Seen:
    """What the clients of a load have seen; times in seconds."""

    whole: int = 0
    left: int = 0
    firsts: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        def percentiles(seconds: list[float]) -> str:
            cuts = statistics.quantiles(seconds, n=100, method="inclusive")
            return f"p50 {1000 * cuts[49]:.0f} p99 {1000 * cuts[98]:.0f} ms"

        return (
            f"{self.whole} requests answered and {self.left} left; first token {percentiles(self.firsts)}, "
            f"between chunks {percentiles(self.between)}"
        )


def body_of(source: random.Random) -> dict[str, Any]:
    """Return a request of a random kind."""
    prompt = "".join(source.choices("abcdefgh ", k=source.randint(1, 60)))
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2},
        {"n": 2, "temperature": 1},
        {"use_beam_search": True, "n": 2},
        {"stop": ["a", "ef"]},
        {"temperature": 1, "top_p": 0.9, "seed": source.randrange(100)},
    ]
    fields = {"max_tokens": source.randint(1, 24), "ignore_eos": True, "temperature": 0}
    return {"prompt": prompt, **fields, **source.choice(kinds), "stream": source.random() < 0.6}


async def ask(address: tuple[str, int], body: dict[str, Any], source: random.Random, seen: Seen) -> None:
    """Send a request; leave in the middle with a probability of 30 %, or read its whole answer."""
    content = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    whole = head + b"Content-Length: %d\r\n\r\n" % len(content) + content
    begin = time.monotonic()
    reader, writer = await asyncio.open_connection(*address)
    try:
        if source.random() < 0.3:
            writer.write(whole[: source.randint(0, len(whole))] if source.random() < 0.3 else whole)
            await writer.drain()
            await asyncio.sleep(source.random() * 0.2)
            seen.left += 1
            if source.random() < 0.5:
                writer.transport.abort()
            return
        writer.write(whole)
        assert (await reader.readline()).split()[1] == b"200"
        last, ends = None, b""
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                assert b'"error"' not in line, line
                now = time.monotonic()
                if last is None:
                    seen.firsts.append(now - begin)
                else:
                    seen.between.append(now - last)
                last = now
            ends = line if line.strip() else ends
        if body["stream"]:
            assert last is not None
        else:
            choices = json.loads(ends)["choices"]
            assert len(choices) == body.get("n", 1) and all(choice["finish_reason"] for choice in choices)
        seen.whole += 1
    finally:
        writer.close()


async def load(url: str, count: int, seed: int) -> Seen:
    host, port = url.removeprefix("http://").split(":")
    source, seen = random.Random(seed), Seen()
    tasks = []
    for number in range(count):
        own = random.Random(f"{seed}-{number}")  # so that what a client does depends on no other client's time
        tasks.append(asyncio.ensure_future(ask((host, int(port)), body_of(own), own, seen)))
        await asyncio.sleep(source.expovariate(PER_SECOND))
    await asyncio.gather(*tasks)
    assert seen.whole + seen.left == count and seen.left > count / 5
    return seen


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def status(pid: int, name: str) -> int:
    (line,) = (each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1])


def is_idle(url: str) -> bool:
    """Return whether no request runs or waits and no page is held."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    values = [float(line.split()[-1]) for line in lines if line.startswith(names)]
    return len(values) >= len(names) and not any(values)


@pytest.mark.fuzz
def test_nothing_stays_of_requests(folder: Path, counts: Callable[[str], None]) -> None:
    with running_command(folder) as command:
        pids = [command.popen.pid, *children_of(command.popen.pid)]
        assert len(pids) == 2

        def used() -> list[int]:
            return [count for pid in pids for count in (descriptors(pid), status(pid, "Threads"))]

        def settled() -> list[int]:
            # The kernel and the event loop close connections of clients that left when they come to it.
            until(lambda: is_idle(command.url))
            counts, end = used(), time.monotonic() + 1
            while time.monotonic() < end:
                time.sleep(0.05)
                if counts != (now := used()):
                    counts, end = now, time.monotonic() + 1
            return counts

        asyncio.run(load(command.url, 60, seed=0))  # first uses of everything
        before, memory = settled(), [status(pid, "VmRSS") for pid in pids]
        seen = asyncio.run(load(command.url, 120 * fuzzing.ROUNDS, seed=1))
        after = settled()
        assert all(new <= old for new, old in zip(after, before, strict=True)), (before, after)
        grown = [(status(pid, "VmRSS") - old) / 1024 for pid, old in zip(pids, memory, strict=True)]
        assert max(grown) < 24, grown
    counts(f"load: {seen}; memory grew by {grown[0]:.1f} and {grown[1]:.1f} MB")


def test_no_task_stays_of_requests(server: RunningServer) -> None:
    def tasks() -> int:
        gc.collect()
        return sum(not each.done() for each in gc.get_objects() if type(each) is asyncio.Task)

    asyncio.run(load(server.url, 10, seed=2))
    until(lambda: server.engine.num_requests == 0)
    before = tasks()
    asyncio.run(load(server.url, 20, seed=3))
    until(lambda: server.engine.num_requests == 0)
    until(lambda: tasks() == before)
