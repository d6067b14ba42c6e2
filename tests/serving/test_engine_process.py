"""The engine in a process of its own: its answers cross unchanged, and each process survives or follows the other."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llama_te_infer import Engine, SamplingParams
from llama_te_infer.engine.client import DrainingError, EngineFailedError
from llama_te_infer.engine.logprobs import LogprobRecords, TokenLogprobs, record_of
from llama_te_infer.engine.outputs import Completion, News, RequestOutput, TokenEvent
from llama_te_infer.engine.statistics import Counters, EngineStats
from llama_te_infer.serve.engine_process.client import EngineProcess, Wire
from llama_te_infer.serve.engine_process.messages import Incoming, Step, Submit, encode, from_server
from llama_te_infer.serve.engine_process.server import EngineServer
from serving.conftest import RunningCommand, running_command

PROMPT = "The sky is"
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 480, "ignore_eos": True}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_cross_in_parts_and_unchanged() -> None:
    logprobs = TokenLogprobs(-0.1, ((3, -1e-9), (4, -float("inf"))))
    event = TokenEvent(1, 0, 5, "é\u2028", logprobs, "stop", "x")
    output = RequestOutput(1, [1, 2], [Completion(0, [5], "é", "stop", 5, [logprobs], 0.25)], [None, logprobs])
    steps = [Step(News([event], [output], [7], None)), Step(News())]
    content, incoming = b"".join(map(encode, steps)), Incoming()
    messages = [message for byte in content for message in incoming.add(bytes([byte]))]
    assert messages == steps and incoming.add(content) == steps


def test_log_probabilities_that_nobody_has_read_cross_as_lists() -> None:
    records, prompt = LogprobRecords(2), LogprobRecords(1, before=1)
    records.append(record_of(-0.5, [(3, -0.25), (4, -float("inf"))], 2))
    prompt.write(1, [record_of(-0.5, [(3, -0.25)], 1)])
    completion = Completion(0, [5], "é", "stop", 5, records)  # type: ignore[arg-type]
    output = RequestOutput(1, [1, 2], [completion], prompt)  # type: ignore[arg-type]
    (message,) = Incoming().add(encode(Step(News([], [output]))))
    assert isinstance(message, Step) and message.news.outputs == [output]
    assert message.news.outputs[0].outputs[0].__dict__["logprobs"] == completion.logprobs != []


def test_counters_cross_without_the_bounds_of_their_histograms() -> None:
    """The bounds never change, and would be half of a step's message."""
    counters = Counters(1, 2, 3, 4, 5)
    counters.add_tokens(1.5, [0.25, None, 1.0])
    counters.step_tokens.add(7)
    counters.time_to_first_token_seconds.add(0.03)
    step = Step(News(stats=EngineStats(1, 2, 3, 4, 64, True, "fp8", counters)))
    content = encode(step)
    (message,) = Incoming().add(content)
    assert message == step and isinstance(message, Step) and message.news.stats is not None
    crossed = message.news.stats.counters
    for name in ("step_tokens", "time_to_first_token_seconds", "inter_token_seconds"):
        assert getattr(crossed, name).bounds == getattr(counters, name).bounds != ()
    assert len(content) < 500, "888 bytes with the bounds"


def test_parameters_cross_unchanged() -> None:
    params = SamplingParams(stop=["a", "b"], logit_bias={5: 1.0}, allowed_token_ids=[1, 5], seed=2**63 - 1, logprobs=3)
    beams = SamplingParams(num_beams=4, n=2, length_penalty=0.5, early_stopping="never")
    for each in (params, beams):
        message = Submit(1, [1, 2], each, 0.5)
        assert from_server.decode(encode(message)[4:]) == message


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (FloatingPointError("NaN"), FloatingPointError, "NaN"),
        (torch.OutOfMemoryError("CUDA"), RuntimeError, "OutOfMemoryError: CUDA"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "bad"), ValueError, "UnicodeDecodeError: .*bad"),
        (KeyError("a"), RuntimeError, "KeyError: 'a'"),
    ],
)
def test_errors_cross_as_one_of_few_types(error: Exception, kind: type[Exception], text: str) -> None:
    (message,) = Incoming().add(encode(Step(News(failure=error))))
    assert isinstance(message, Step) and type(message.news.failure) is kind
    with pytest.raises(kind, match=text):
        raise message.news.failure


# --- both ends in this process ----------------------------------------------------------------------------------------


@asynccontextmanager
async def split(engine: Engine) -> AsyncIterator[EngineProcess]:
    """Connect a client with an engine in a thread; at the end all pages are free."""
    here, there = socket.socketpair()
    server = EngineServer(there, lambda: server._loop.close())
    threads = [threading.Thread(target=server.listen), threading.Thread(target=server.run, args=(engine, {}))]
    wire = Wire(subprocess.Popen([sys.executable, "-c", ""]), here)
    await asyncio.get_running_loop().create_unix_connection(lambda: wire, sock=here)
    ready = asyncio.ensure_future(wire.ready(lambda stage: None))
    await asyncio.sleep(0)
    threads[1].start()
    client = EngineProcess(wire, await ready, engine.tokenizer, None)
    threads[0].start()
    try:
        yield client
    finally:
        await asyncio.to_thread(client.close)
        for thread in threads:
            await asyncio.to_thread(thread.join)
        there.close()
    engine.reset_prefix_cache()
    assert (
        not engine.has_unfinished and engine.scheduler.blocks.available == engine.scheduler.blocks.pool.total_num_pages
    )


def test_the_first_form_finds_its_tokenizer_prepared(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    async def main() -> None:
        async with split(engine):
            await asyncio.to_thread(wait_for, lambda: engine.grammars._tokens is not None)

    asyncio.run(main())


def test_a_failed_step_ends_what_runs_and_the_next_request_succeeds(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def no_memory() -> Any:
        engine._start_over()
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def main() -> None:
        async with split(engine) as client:
            stream = await client.stream("a", SamplingParams(max_tokens=400, ignore_eos=True))
            with monkeypatch.context() as patch:
                patch.setattr(engine, "step", no_memory)
                with pytest.raises(EngineFailedError, match="out of memory"):
                    await stream.finish()
            assert "out of memory" in str(client.failure) and client.num_requests == 0
            output = await client.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))
            assert len(output.outputs[0].token_ids) == 3 and client.failure is None

    asyncio.run(main())


def test_a_stream_that_is_closed_or_cancelled_ends_its_request(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    async def main() -> None:
        async with split(engine) as client:
            params = SamplingParams(max_tokens=400, ignore_eos=True)
            (await client.stream("a", params)).close()
            send = client._wire.send

            def send_and_cancel(message: Any) -> None:
                send(message)
                submitting.cancel()  # before the answer can come

            monkeypatch.setattr(client._wire, "send", send_and_cancel)
            submitting = asyncio.ensure_future(client.stream("b", params))
            with pytest.raises(asyncio.CancelledError):
                await submitting
            monkeypatch.undo()
            while client.num_requests:
                await asyncio.sleep(0.001)
            assert client.stats().counters.generation_tokens < 800

    asyncio.run(main())


def test_steps_that_come_together_are_told_once(make_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        async with split(make_engine()) as client:
            streams = [await client.stream("a", SamplingParams(max_tokens=200, ignore_eos=True)) for _ in range(2)]
            told: list[list[int]] = [[], []]
            for stream, counts in zip(streams, told, strict=True):
                stream.listen(lambda stream=stream, counts=counts: counts.append(len(stream.take())))
            first = [len(stream.take()) for stream in streams]
            while not all(stream.is_complete for stream in streams):
                await asyncio.sleep(0)
                time.sleep(0.05)  # the event loop falls behind
            for before, counts in zip(first, told, strict=True):
                assert before + sum(counts) == 200 and max(counts) > 3 and len(counts) < 100

    asyncio.run(main())


def test_closing_ends_what_runs(make_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        async with split(make_engine()) as client:
            stream = await client.stream("a", SamplingParams(max_tokens=400, ignore_eos=True))
            await asyncio.to_thread(client.close)
            with pytest.raises(DrainingError):
                await stream.finish()
            assert client.failure is None and not client.is_alive
            with pytest.raises(DrainingError):
                await client.generate("a")

    asyncio.run(main())


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[RunningCommand]:
    # Without the cache, as `reference`: earlier prompts do not change its roundings.
    with running_command(folder, "--no-enable-prefix-caching") as running:
        yield running


@pytest.fixture
def own(folder: Path) -> Iterator[RunningCommand]:
    """A server that a test may end."""
    with running_command(folder) as running:
        yield running


def ask(running: RunningCommand, **body: Any) -> Any:
    answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": PROMPT, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_greedy_texts_and_logprobs_are_the_engines_own(running: RunningCommand, reference: Engine) -> None:
    (choice,) = ask(running, max_tokens=40, temperature=0, logprobs=4, prompt_logprobs=2, return_token_ids=True)
    params = SamplingParams(max_tokens=40, temperature=0, logprobs=4, prompt_logprobs=2)
    (output,) = reference.generate([PROMPT], params)
    (completion,) = output.outputs
    assert (choice["text"], choice["token_ids"]) == (completion.text, completion.token_ids)
    expected = [each.logprob for each in completion.logprobs]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-6)
    for found, each in zip(choice["prompt_logprobs"][1:], output.prompt_logprobs[1:], strict=True):
        for token, logprob in each.top:
            assert found[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-6)


def test_beams_are_the_engines_own(running: RunningCommand, reference: Engine) -> None:
    choices = ask(running, max_tokens=12, n=3, use_beam_search=True, best_of=4, logprobs=1, return_token_ids=True)
    (output,) = reference.generate([PROMPT], SamplingParams(max_tokens=12, n=3, num_beams=4, logprobs=1))
    for choice, completion in zip(choices, output.outputs, strict=True):
        assert (choice["text"], choice["token_ids"]) == (completion.text, completion.token_ids)
        expected = [each.logprob for each in completion.logprobs]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-6)


def test_what_the_engine_refuses(running: RunningCommand) -> None:
    answer = httpx.post(f"{running.url}/v1/completions", json={"prompt": [300]})
    assert answer.status_code == 400
    assert "the model knows 0 to 258" in answer.json()["error"]["message"]


def test_a_slow_reader_stalls_nobody(running: RunningCommand) -> None:
    body = json.dumps({**LONG, "n": 4, "temperature": 1, "logprobs": 20, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", httpx.URL(running.url).port))
        slow.sendall(head.encode() + body)
        slow.recv(1)
        assert len(ask(running, max_tokens=100, ignore_eos=True, return_token_ids=True)[0]["token_ids"]) == 100
        content = b"".join(iter(lambda: slow.recv(1 << 16), b""))
    assert content.count(b'"finish_reason":"length"') == 4 and b"data: [DONE]" in content


def test_a_server_that_falls_behind_writes_fewer_chunks(running: RunningCommand) -> None:
    body = {**LONG, "temperature": 0}
    (expected,) = ask(running, **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    texts: list[str] = []
    usage = None
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body | options, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage")
            texts += [choice["text"] for choice in chunk["choices"]]
            if len(texts) == 3:
                os.kill(running.popen.pid, signal.SIGSTOP)
                time.sleep(0.3)
                os.kill(running.popen.pid, signal.SIGCONT)
    assert usage is not None and usage["completion_tokens"] == 480
    assert "".join(texts) == expected["text"] and len(texts) < 450


def test_thousands_of_requests_leave_nothing(running: RunningCommand) -> None:
    async def ask_many(count: int) -> None:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:

            async def ask_some(number: int) -> None:
                for index in range(count // 16):
                    body = {"prompt": f"{number} {index}", "max_tokens": 1, "stream": index % 2 == 0}
                    answer = await client.post(f"{running.url}/v1/completions", json=body)
                    assert answer.status_code == 200

            await asyncio.gather(*map(ask_some, range(16)))

    def use() -> list[tuple[int, int, int]]:
        processes = [Path(f"/proc/{pid}") for pid in (running.popen.pid, running.engine_pid)]
        wait_for(lambda: len(list((processes[0] / "fd").iterdir())) == files[0] if files else True)
        return [
            (
                int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                len(list((process / "fd").iterdir())),
                len(list((process / "task").iterdir())),
            )
            for process in processes
        ]

    files: list[int] = []
    asyncio.run(ask_many(800))
    time.sleep(0.1)
    before = use()
    files.append(before[0][1])
    asyncio.run(ask_many(1200))
    for (memory, *others), (memory_before, *others_before) in zip(use(), before, strict=True):
        assert others == others_before
        assert memory < memory_before + (8 << 20)


def test_the_engines_death_ends_the_server_with_an_error(own: RunningCommand) -> None:
    # Each request alone fills the batch for hundreds of steps, so the first one runs and the others wait.
    body = {**LONG, "n": 4}
    results: list[tuple[int, str]] = []

    def read(stream: bool) -> None:
        answer = httpx.post(f"{own.url}/v1/completions", json={**body, "stream": stream}, timeout=60)
        results.append((answer.status_code, answer.text))

    def all_wait() -> bool:
        metrics = httpx.get(f"{own.url}/metrics").text
        return re.search(r"^vllm:num_requests_waiting\{.*\} 8\.0$", metrics, re.MULTILINE) is not None

    threads = [threading.Thread(target=read, args=(number < 4,)) for number in range(8)]
    with httpx.stream("POST", f"{own.url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        for thread in threads:
            thread.start()
        wait_for(all_wait)
        os.kill(own.engine_pid, signal.SIGKILL)
        streamed = "\n".join(lines)
    for thread in threads:
        thread.join()
    assert own.popen.wait(30) == 1
    reason = "the engine's process has ended with signal 9 (SIGKILL)"
    assert reason in streamed and streamed.rstrip().endswith("data: [DONE]")
    assert all(reason in text for _, text in results)
    assert sorted(status for status, _ in results) == [200] * 4 + [500] * 4


def test_the_servers_death_ends_the_engine_and_frees_the_port(folder: Path) -> None:
    with running_command(folder) as running:
        engine = Path(f"/proc/{running.engine_pid}")
        with httpx.stream("POST", f"{running.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as answer:
            next(answer.iter_lines())
            running.popen.kill()
        running.popen.wait()
        wait_for(lambda: not engine.exists() or "(zombie)" in (engine / "status").read_text())
        with socket.create_server(("127.0.0.1", httpx.URL(running.url).port)):
            pass
