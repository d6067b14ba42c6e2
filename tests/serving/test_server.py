"""The other endpoints, keys, limits, clients that leave, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from llama_te_infer import Engine, __version__
from serving.conftest import RunningServer, serving

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_what_is_served(server: RunningServer) -> None:
    (model,) = server.client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 512)
    assert server.client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    assert httpx.get(f"{server.url}/version").json() == {"version": __version__}
    assert httpx.get(f"{server.url}/health").status_code == httpx.get(f"{server.url}/ready").status_code == 200


def test_tokens(server: RunningServer) -> None:
    def ask(path: str, **body: Any) -> Any:
        return httpx.post(f"{server.url}{path}", json=body).json()

    assert ask("/tokenize", prompt="ab")["tokens"] == [
        256,
        *ask("/tokenize", prompt="ab", add_special_tokens=False)["tokens"],
    ]
    found = ask("/tokenize", prompt="é", return_token_strs=True)
    assert (found["count"], found["token_strs"][0]) == (3, "<|bos|>")
    chat = ask("/tokenize", messages=[{"role": "user", "content": "Hello"}])["tokens"]
    assert ask("/detokenize", tokens=chat) == {"prompt": "<|bos|><|user|>Hello<|end|><|assistant|>"}
    assert "Give either" in ask("/tokenize")["error"]["message"]
    assert "knows 0 to 258" in ask("/detokenize", tokens=[999])["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_wrong_paths_get_openais_errors(server: RunningServer, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{server.url}{path}")
    assert answer.status_code == status and path in answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": NaN}'])
def test_bodies_that_are_no_request(server: RunningServer, content: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_keys_and_limits(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), api_keys=("one", "two"), max_body_bytes=1000) as server:
        url = f"{server.url}/v1/completions"

        def post(key: str | None, **body: Any) -> httpx.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx.post(url, headers=headers, json={"prompt": "a", "max_tokens": 1, **body})

        assert [post(key).status_code for key in ("one", "two", "three", None)] == [200, 200, 401, 401]
        assert post(None).json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        too_large = post("one", prompt="a" * 2000)
        assert too_large.status_code == 413 and "1,000 bytes" in too_large.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(server: RunningServer, stream: bool) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            call = asyncio.ensure_future(
                client.post(f"{server.url}/v1/completions", json={**LONG, "n": 4, "stream": stream})
            )
            while not server.engine.engine.scheduler.rows:
                await asyncio.sleep(0.001)
            call.cancel()

    asyncio.run(leave())
    until(lambda: server.engine.num_requests == 0)


def test_a_request_that_takes_too_long(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), request_timeout=0.05) as server:
        whole = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert whole.status_code == 408 and whole.json()["error"]["type"] == "timeout_error"
        streamed = httpx.post(f"{server.url}/v1/completions", json={**LONG, "stream": True}).text
        *_, error, done = streamed.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "timeout_error"
        assert done == "data: [DONE]"
        until(lambda: server.engine.num_requests == 0)


def test_more_requests_than_allowed(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(), max_requests=2) as server:
        url = f"{server.url}/v1/completions"
        threads = [threading.Thread(target=httpx.post, args=(url,), kwargs={"json": LONG}) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: server.engine.num_requests == 2)
        answer = httpx.post(url, json=LONG)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert httpx.post(url, json={**LONG, "max_tokens": 1}).status_code == 200


def test_keep_alives_while_a_stream_waits(make_engine: Callable[..., Engine]) -> None:
    with serving(make_engine(max_batch_size=1), keep_alive_interval=0.01) as server:
        url = f"{server.url}/v1/completions"
        first = threading.Thread(target=httpx.post, args=(url,), kwargs={"json": LONG})
        first.start()
        until(lambda: bool(server.engine.engine.scheduler.rows))
        text = httpx.post(url, json={"prompt": "b", "max_tokens": 2, "stream": True}).text
        first.join()
        assert text.startswith(": keep-alive\n\n") and text.endswith("data: [DONE]\n\n")


def test_other_pages_may_call_if_allowed(make_engine: Callable[..., Engine], server: RunningServer) -> None:
    headers = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in httpx.get(f"{server.url}/health", headers=headers).headers
    with serving(make_engine(), allowed_origins=("https://example.org",)) as other:
        answer = httpx.get(f"{other.url}/health", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
