"""What an engine counts, and the times of its requests."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from llama_te_convert import convert_llama_hf_to_te
from llama_te_infer import AsyncEngine, Engine, SamplingParams
from llama_te_infer.engine import engine as engine_module
from llama_te_infer.engine.client import EngineFailedError
from llama_te_infer.engine.statistics import Histogram, RequestTimes

PROMPT = list(range(3, 23))
GREEDY = SamplingParams(max_tokens=5, temperature=0)


@pytest.fixture
def make(tiny_llama: Callable[..., PreTrainedModel]) -> Callable[..., Engine]:
    hf = tiny_llama(initializer_range=0.3, num_hidden_layers=1, eos_token_id=None, max_position_embeddings=128)
    model = convert_llama_hf_to_te(hf)
    return lambda **options: Engine(model, **{"max_batch_size": 4, "page_size": 8, **options})


def test_a_histogram() -> None:
    class Small(Histogram):
        bounds = (1.0, 2.0)

    histogram = Small()
    histogram.add(1.0)
    histogram.add(1.5, 3)
    copy = histogram.copy()
    histogram.add(9.0)
    assert (histogram.counts, histogram.total) == ([1, 3, 1], 14.5)
    assert (copy.counts, copy.total, copy.bounds) == ([1, 3, 0], 5.5, (1.0, 2.0))


def test_tokens_and_prefixes(make: Callable[..., Engine]) -> None:
    engine = make()
    outputs = [engine.generate(PROMPT, GREEDY)[0] for _ in range(2)]
    engine.generate(PROMPT, SamplingParams(max_tokens=3, temperature=1.0, n=2, seed=0))
    engine.generate(PROMPT, SamplingParams(max_tokens=4, num_beams=2, n=2))
    scored = engine.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [output.num_cached_tokens for output in [*outputs, *scored]] == [0, 16, 0]
    counters = engine.stats().counters
    assert counters.prompt_tokens == 5 * 20
    assert counters.generation_tokens == 5 + 5 + 2 * 3 + 2 * 4 + 1
    # Prompts with log-probabilities are not looked up.
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (4 * 20, 3 * 16)
    # The first token of a text follows none, and beams bring their tokens all at once.
    assert sum(counters.inter_token_seconds.counts) == 4 + 4 + 2 * 2
    # Each step chooses a token for each row, beams included, and reads what the prefix cache does not have.
    chosen = 5 + 5 + 2 * 3 + 2 * 4 + 1
    assert counters.step_tokens.total == chosen + 5 * 20 - 3 * 16
    assert sum(counters.step_tokens.counts) == 5 + 5 + 3 + 4 + 1
    assert pickle.loads(pickle.dumps(engine.stats())) == engine.stats()


def test_the_load(make: Callable[..., Engine]) -> None:
    engine = make(max_batch_size=2, prefix_caching=False)
    for _ in range(3):
        engine.submit(PROMPT, GREEDY)
    assert (engine.stats().num_requests_running, engine.stats().num_requests_waiting) == (0, 3)
    engine.step()
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting) == (2, 1)
    assert (stats.num_pages_used, stats.total_num_pages) == (6, 32)
    assert stats.kv_cache_usage == 6 / 32
    while engine.has_unfinished:
        engine.step()
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage) == (0, 0, 0)
    assert stats.counters.num_preemptions == 0


def test_preempted_requests_are_counted_once(make: Callable[..., Engine]) -> None:
    engine = make(total_num_pages=7)
    params = SamplingParams(max_tokens=20, temperature=0)
    outputs = engine.generate([PROMPT, PROMPT[::-1]], params)
    counters = engine.stats().counters
    assert counters.num_preemptions > 0
    assert (counters.prompt_tokens, counters.generation_tokens) == (40, 40)
    assert counters.prefix_cache_queries == 40
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    assert sum(counters.inter_token_seconds.counts) == 38


def test_times(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(max_batch_size=1)
    clock = itertools.count(100.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    first, second = engine.submit(PROMPT, GREEDY, arrival=90.0), engine.submit(PROMPT[::-1], GREEDY)
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    # The clock: 100 the second one arrives, 101 the first one begins, 102 its first token, ...
    assert outputs[first].times == RequestTimes(90.0, 101.0, 102.0, 107.0)
    times = outputs[second].times
    assert times == RequestTimes(100.0, 106.0, 108.0, 112.0)
    assert (times.queue, times.prefill, times.decode, times.inference) == (6, 2, 4, 6)
    assert (times.time_to_first_token, times.e2e) == (8, 12)


def test_requests_without_tokens_have_no_times(make: Callable[..., Engine]) -> None:
    engine = make()
    engine.cancel(engine.submit(PROMPT, GREEDY, arrival=1.0))
    (output,) = engine.step()
    times = output.times
    assert times == RequestTimes(1.0)
    assert {times.queue, times.prefill, times.decode, times.inference, times.time_to_first_token, times.e2e} == {None}


def test_ends_are_reported_once_also_of_closed_streams(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ends = make(), []

    async def use() -> None:
        async with AsyncEngine(engine) as requests:
            long = SamplingParams(max_tokens=100, temperature=0)
            whole = await requests.stream(PROMPT, GREEDY, lambda *end: ends.append(("whole", *end)))
            await whole.finish()
            (await requests.stream(PROMPT, long, lambda *end: ends.append(("closed", *end)))).close()
            while requests.num_requests:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(engine, "step", _fail)
            lost = await requests.stream(PROMPT, long, lambda *end: ends.append(("lost", *end)))
            with pytest.raises(EngineFailedError):
                await lost.finish()
            monkeypatch.undo()
            assert requests.stats().counters.generation_tokens >= 5

    def _fail() -> Any:
        engine._recover(MemoryError())
        raise MemoryError("no memory")

    asyncio.run(use())
    assert [name for name, *_ in ends] == ["whole", "closed", "lost"]
    (_, whole, _), (_, closed, _), (_, lost, error) = ends
    assert whole.times.e2e > 0 and closed.outputs[0].finish_reason == "cancelled"
    assert lost is None and isinstance(error, EngineFailedError)
