"""How the official client sees errors, headers, retries and timeouts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from llama_te_infer import Engine
from serving.conftest import RunningServer, serving
from serving.test_server import until

LONG: Any = {"model": "tiny", "prompt": "a", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
SHORT: Any = {"model": "tiny", "prompt": "a", "max_tokens": 2}


def test_headers(server: RunningServer) -> None:
    raw = server.client.completions.with_raw_response.create(**SHORT)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().object == "text_completion"
    with server.client.completions.with_streaming_response.create(**SHORT, stream=True) as streamed:
        assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert list(streamed.iter_lines())[-2:] == ["data: [DONE]", ""]


def test_every_error_has_its_class(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), max_requests=1, api_keys=("key",), max_body_bytes=10_000) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(**{**SHORT, "temperature": -1})
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(**{**SHORT, "model": "other"})
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.APIStatusError, match="10,000 bytes") as large:
            client.completions.create(**{**SHORT, "prompt": "a" * 20_000})
        assert large.value.status_code == 413
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).completions.create(**LONG)
        until(lambda: server.engine.num_requests == 0)

        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as busy:
            client.completions.create(**SHORT)
        assert busy.value.response.headers["retry-after"] == "1"
        # With retries the client waits as long as Retry-After says, and succeeds.
        answers: list[Any] = []
        patient = client.with_options(max_retries=5)
        waiting = threading.Thread(target=lambda: answers.append(patient.completions.create(**SHORT)))
        waiting.start()
        stream.close()
        waiting.join(30)
        assert answers[0].usage.completion_tokens <= 2


def test_a_request_that_took_too_long_is_not_sent_again(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), request_timeout=0.05) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**LONG)
        assert caught.value.status_code == 408 and caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(client.completions.create(**LONG, stream=True))


def test_the_async_client(server: RunningServer) -> None:
    async def use() -> tuple[Any, Any, list[Any]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            arguments: Any = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 6, "seed": 1}
            whole = await client.completions.create(**arguments)
            chunks = [chunk async for chunk in await client.completions.create(**arguments, stream=True)]
            return await client.models.list(), whole, chunks

    models, whole, chunks = asyncio.run(use())
    assert [model.id for model in models.data] == ["tiny"]
    for choice in whole.choices:
        own = [part.text for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(own) == choice.text
