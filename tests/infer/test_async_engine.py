"""An engine for asyncio: its answers are the engine's own, and no request, page or thread is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from infer.test_engine_requests import CHAT, tokenizer  # noqa: F401
from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import AsyncEngine, Engine, SamplingParams
from llama_te_infer.engine.client import DrainingError, EngineFailedError, QueueFullError, RequestStream

GREEDY = SamplingParams(max_tokens=8, temperature=0)
LONG = SamplingParams(max_tokens=50, temperature=0)
PROMPTS = [[1 + (7 * index + step) % 200 for step in range(1 + index % 9)] for index in range(20)]


@pytest.fixture
def engine(tiny_llama: Callable[..., PreTrainedModel], tokenizer: Any) -> Iterator[Engine]:  # noqa: F811
    hf = tiny_llama(
        vocab_size=259, initializer_range=0.3, num_hidden_layers=1, eos_token_id=None, max_position_embeddings=512
    )
    engine = Engine(convert_llama_hf_to_te(hf), tokenizer, max_batch_size=4, page_size=8, prefix_caching=False)
    yield engine
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.pool.total_num_pages, "all pages are free at the end"
    assert not engine.has_unfinished


def run(engine: Engine, use: Callable[[AsyncEngine], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """Run a coroutine with the engine, for at most a minute, and check that its thread ends."""

    async def main() -> Any:
        async with AsyncEngine(engine, **options) as requests:
            result = await asyncio.wait_for(use(requests), 60)
            thread = requests._thread
        assert not thread.is_alive() and requests.num_requests == 0
        return result

    return asyncio.run(main())


async def read(stream: RequestStream) -> list[int]:
    return [event.token_id async for events in stream for event in events]


def test_many_tasks_get_the_engines_own_answers(engine: Engine) -> None:
    expected = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]

    async def use(requests: AsyncEngine) -> list[Any]:
        return await asyncio.gather(*(requests.generate(prompt, GREEDY) for prompt in PROMPTS))

    outputs = run(engine, use)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert [output.prompt_token_ids for output in outputs] == PROMPTS


def test_streams_have_all_tokens_and_texts(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, n=3, seed=5, logprobs=2)
    (expected,) = engine.generate(["abc"], params)

    async def use(requests: AsyncEngine) -> Any:
        stream = await requests.stream("abc", params)
        return [event async for events in stream for event in events], stream.output

    events, output = run(engine, use)
    assert output.outputs == expected.outputs
    for completion in expected.outputs:
        own = [event for event in events if event.index == completion.index]
        assert [event.token_id for event in own] == completion.token_ids
        assert "".join(event.text for event in own) == completion.text
        assert [event.logprobs for event in own] == completion.logprobs
        assert [event.finish_reason for event in own] == [None] * 7 + ["length"]


def test_chat_is_the_engines_chat(engine: Engine) -> None:
    (expected,) = engine.chat(CHAT, GREEDY, tools=[{}])

    async def use(requests: AsyncEngine) -> Any:
        return await requests.chat(CHAT, GREEDY, tools=[{}])

    assert run(engine, use).outputs == expected.outputs


def test_beams(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6, num_beams=3, n=2)
    (expected,) = engine.generate(["abc"], params)

    async def use(requests: AsyncEngine) -> Any:
        return await requests.generate("abc", params)

    assert run(engine, use).outputs == expected.outputs


@pytest.mark.parametrize("prompt", ["abc", [], [10**9], {"role": "user"}, [1] * 600])
def test_a_bad_request_is_refused_alone(engine: Engine, prompt: Any) -> None:
    params = SamplingParams(max_tokens=8, stop_token_ids=[10**6]) if prompt == "abc" else GREEDY

    async def use(requests: AsyncEngine) -> Any:
        good = asyncio.create_task(requests.generate(PROMPTS[3], GREEDY))
        with pytest.raises(ValueError, match=r"prompt|stop_token_ids"):
            await requests.generate(prompt, params)
        return await good

    (expected,) = engine.generate([PROMPTS[3]], GREEDY)
    assert run(engine, use).outputs == expected.outputs


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("way", ["close", "drop", "cancel the task"])
def test_a_request_that_nobody_reads_ends_while_others_run(engine: Engine, way: str) -> None:
    async def use(requests: AsyncEngine) -> None:
        other = asyncio.create_task(requests.generate(PROMPTS[5], LONG))
        stream = await requests.stream(PROMPTS[4], SamplingParams(max_tokens=400, temperature=0))
        reader = asyncio.create_task(stream.finish())
        await asyncio.sleep(0)  # so that the task has begun
        await until(lambda: bool(engine.scheduler.rows))
        if way == "close":
            reader.cancel()
            stream.close()
        elif way == "cancel the task":
            reader.cancel()
        else:
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            del stream, reader
            gc.collect()
        await until(lambda: requests.num_requests <= 1)
        assert len((await other).outputs[0].token_ids) == 50

    run(engine, use)


def test_a_stream_that_is_dropped_before_its_first_event_ends(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        for _ in range(3):
            await requests.stream(PROMPTS[4], LONG)  # the result is dropped
        gc.collect()
        await until(lambda: requests.num_requests == 0)
        assert not engine.scheduler.rows and not engine.scheduler.waiting

    run(engine, use)


def test_a_task_cancelled_while_it_submits_leaves_nothing(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        for delay in range(30):
            task = asyncio.create_task(requests.generate("abc" * (delay % 3 + 1), LONG))
            await asyncio.sleep(delay * 1e-4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: requests.num_requests == 0)

    run(engine, use)


def test_a_slow_reader_delays_nobody_and_gets_all(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        slow = await requests.stream(PROMPTS[4], LONG)
        await requests.generate(PROMPTS[5], LONG)
        await until(lambda: slow.output is not None)
        batches = [events async for events in slow]
        assert len(batches) == 1 and len(batches[0]) == 50

    run(engine, use)


def test_more_requests_than_allowed_are_refused_at_once(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        streams = [await requests.stream(prompt, LONG) for prompt in PROMPTS[:6]]
        with pytest.raises(QueueFullError, match="6 requests"):
            await requests.stream(PROMPTS[7], LONG)
        await streams[0].finish()
        assert await read(await requests.stream(PROMPTS[7], GREEDY))
        for stream in streams[1:]:
            await stream.finish()

    run(engine, use, max_requests=6)
    with pytest.raises(ValueError, match="max_requests=0"):
        AsyncEngine(engine, max_requests=0)


def test_draining_refuses_new_requests_and_finishes_the_old_ones(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        old = [asyncio.create_task(requests.generate(prompt, LONG)) for prompt in PROMPTS[:6]]
        await until(lambda: requests.num_requests == 6)
        drained = asyncio.create_task(requests.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await requests.generate(PROMPTS[0], GREEDY)
        assert await drained
        assert [len((await task).outputs[0].token_ids) for task in old] == [50] * 6

    run(engine, use)


def test_draining_cancels_what_takes_longer(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> None:
        old = [asyncio.create_task(requests.generate(prompt, LONG)) for prompt in PROMPTS[:6]]
        await until(lambda: requests.num_requests == 6)
        assert not await requests.drain(0)
        reasons = {(await task).outputs[0].finish_reason for task in old}
        assert "cancelled" in reasons

    run(engine, use)


def test_a_failed_step_ends_what_runs_and_the_next_request_succeeds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(requests: AsyncEngine) -> None:
        running = asyncio.create_task(requests.generate(PROMPTS[1], LONG))
        waiting = [asyncio.create_task(requests.generate(prompt, LONG)) for prompt in PROMPTS[:8]]
        await until(lambda: bool(engine.scheduler.rows))
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", _no_memory(engine))
            for task in [running, *waiting]:
                with pytest.raises(EngineFailedError, match="out of memory"):
                    await task
        assert isinstance(requests.failure, torch.OutOfMemoryError) and requests.num_requests == 0
        assert len((await requests.generate(PROMPTS[1], GREEDY)).outputs[0].token_ids) == 8
        assert requests.failure is None

    run(engine, use)


def _no_memory(engine: Engine) -> Callable[[], Any]:
    def step() -> Any:
        engine._start_over()
        raise torch.OutOfMemoryError("CUDA out of memory")

    return step


def test_without_its_device_the_engine_refuses_everything(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(requests: AsyncEngine) -> None:
        monkeypatch.setattr("llama_te_infer.engine.loop.has_lost_device", lambda device: True)
        monkeypatch.setattr(engine, "step", _no_memory(engine))
        with pytest.raises(EngineFailedError, match="out of memory"):
            await requests.generate(PROMPTS[1], LONG)
        await until(lambda: not requests._thread.is_alive())
        with pytest.raises(EngineFailedError, match="has ended"):
            await requests.generate(PROMPTS[1], LONG)
        assert await requests.drain(1)

    run(engine, use)


def test_closing_at_any_moment_ends_what_runs(engine: Engine) -> None:
    for delay in range(60):

        async def use(requests: AsyncEngine, delay: int = delay) -> None:
            streams = [await requests.stream(prompt, LONG) for prompt in PROMPTS[:3]]
            await asyncio.sleep(delay * 1e-4)
            await asyncio.to_thread(requests.close)
            for stream in streams:
                assert (await asyncio.wait_for(stream.finish(), 10)).outputs

        run(engine, use)


def test_event_loops_of_several_threads(engine: Engine) -> None:
    expected = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]
    found: dict[int, list[int]] = {}

    async def use(requests: AsyncEngine) -> None:
        def other(first: int) -> None:
            async def ask() -> None:
                for index in range(first, len(PROMPTS), 4):
                    found[index] = await read(await requests.stream(PROMPTS[index], GREEDY))

            asyncio.run(ask())

        threads = [threading.Thread(target=other, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))

    run(engine, use)
    assert [found[index] for index in range(len(PROMPTS))] == expected


def test_hundreds_of_streams_with_readers_of_every_kind(engine: Engine) -> None:
    """Readers leave, raise, read slowly, or give a request that is refused; all others get the engine's own answers."""
    expected = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]

    async def ask(requests: AsyncEngine, number: int) -> str:
        prompt, kind = PROMPTS[number % len(PROMPTS)], number % 7
        if kind == 0:
            with pytest.raises(ValueError, match="has the tokens"):
                await requests.stream([*prompt, 10_000], GREEDY)
            return "refused"
        stream = await requests.stream(prompt, GREEDY)
        if kind == 1:
            async for _ in stream:
                raise KeyError(number)
        if kind == 2:
            await anext(stream)
            stream.close()
            return "left"
        if kind == 3:
            await asyncio.sleep(0.05)
        tokens = [event.token_id async for events in stream for event in events]
        assert tokens == expected[number % len(PROMPTS)]
        return "answered"

    async def use(requests: AsyncEngine) -> list[Any]:
        results = await asyncio.gather(*(ask(requests, number) for number in range(350)), return_exceptions=True)
        await until(lambda: requests.num_requests == 0)
        return results

    results = run(engine, use)
    counts = {kind: results.count(kind) for kind in ("refused", "left", "answered")}
    assert counts == {"refused": 50, "left": 50, "answered": 200}
    assert sum(isinstance(each, KeyError) for each in results) == 50


def test_the_loop_stays_free_while_the_engine_computes(engine: Engine) -> None:
    async def use(requests: AsyncEngine) -> float:
        tasks = [asyncio.create_task(requests.generate(prompt, LONG)) for prompt in PROMPTS]
        longest = 0.0
        while not all(task.done() for task in tasks):
            begin = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - begin)
        return longest

    assert run(engine, use) < 1, "a step takes milliseconds; the loop never waits for the whole run"
