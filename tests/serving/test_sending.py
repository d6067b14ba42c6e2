"""How events reach clients: at once on this server's connections, through a task elsewhere, and never out of order."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from llama_te_infer import AsyncEngine, Engine
from llama_te_infer.serve import ServerSettings, create_app
from llama_te_infer.serve.answers import Answer
from llama_te_infer.serve.connections import Connection
from llama_te_infer.serve.sending import EventStream
from serving.conftest import RunningServer, serving
from serving.test_connections import HEAD, answer, connect, request
from serving.test_server import until

COMPLETION: dict[str, Any] = {"prompt": "ab", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 100,
    "ignore_eos": True,
    "temperature": 0,
}


def chunks_of(body: str) -> list[Any]:
    *events, done = body.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(body: str) -> str:
    return "".join(choice["text"] for chunk in chunks_of(body) for choice in chunk["choices"])


def ask(server: RunningServer, **fields: Any) -> str:
    body = COMPLETION | {"stream": True} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Has an entry for each time that a response's task was woken."""
    calls: list[None] = []
    wait = EventStream._wait

    async def counted(self: EventStream) -> bytes | None:
        part = await wait(self)
        calls.append(None)
        return part

    monkeypatch.setattr(EventStream, "_wait", counted)
    return calls


def test_no_task_wakes_for_a_token(server: RunningServer, woken: list[None]) -> None:
    assert len(chunks_of(ask(server))) > 50
    assert len(woken) == 1  # for the end


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_a_chunk_with_text_alone_is_as_any_other(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    """Chunks with the usage are written one by one; the others differ from their neighbours in the text alone."""
    options: dict[str, Any] = {"include_usage": True, "continuous_usage_stats": True}
    body = body | {"n": 2, "temperature": 1, "seed": 1, "stream": True}
    headers = {"X-Request-Id": "text"}
    found = []
    for fields in ({}, {"stream_options": options}):
        whole = httpx.post(f"{server.url}{path}", json=body | fields, headers=headers).text
        chunks = [chunk for chunk in chunks_of(whole) if chunk["choices"]]
        for chunk in chunks:
            chunk.pop("usage", None)
            chunk.pop("created")
        found.append(chunks)
    plain, single = found
    for index in range(2):
        mine, other = ([each for each in chunks if each["choices"][0]["index"] == index] for chunks in (plain, single))
        assert mine[0] == other[0] and mine[-1] == other[-1] and len(mine) > 50
        joined = ["".join(_text(chunk) for chunk in chunks) for chunks in (mine, other)]
        assert joined[0] == joined[1]
        assert {json.dumps(_without_text(chunk)) for chunk in mine} == {
            json.dumps(_without_text(chunk)) for chunk in other
        }


def _text(chunk: Any) -> str:
    (choice,) = chunk["choices"]
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


def _without_text(chunk: Any) -> Any:
    (choice,) = chunk["choices"]
    if "text" in choice:
        return {**chunk, "choices": [{**choice, "text": None}]}
    return {**chunk, "choices": [{**choice, "delta": sorted(choice["delta"])}]}


def test_the_end_of_a_stream_of_plain_chunks(server: RunningServer) -> None:
    *_, last, usage = chunks_of(ask(server, stream_options={"include_usage": True}))
    assert last["choices"][0]["finish_reason"] == "length" and usage["usage"]["completion_tokens"] == 100


def test_a_stream_to_a_client_of_http_1_0(server: RunningServer) -> None:
    """It gets the events without chunks, and the connection ends behind them."""
    content = json.dumps(COMPLETION | {"stream": True}).encode()
    with connect(server, request(content, HEAD.replace(b"1.1", b"1.0"))) as connection:
        head, _, body = answer(connection).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and text_of(body.decode()) == text_of(ask(server))


def test_requests_behind_a_stream_on_one_connection(server: RunningServer) -> None:
    stream = request(json.dumps(COMPLETION | {"stream": True}).encode())
    last = b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with connect(server, stream * 2 + last) as connection:
        content = answer(connection)
    assert content.count(b"HTTP/1.1 200") == 3 and content.count(b"\r\n0\r\n\r\nHTTP/1.1 200") == 2


def test_a_server_without_the_extension(make_engine: Callable[..., Engine], server: RunningServer) -> None:
    async def main() -> str:
        async with AsyncEngine(make_engine()) as engine:
            app = create_app(engine, ServerSettings(model_names=("tiny",), log_interval=None))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://a") as client:
                found = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
                return found.text

    assert text_of(asyncio.run(main())) == text_of(ask(server))


@pytest.fixture
def narrow_server(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """The buffers of its connections are full after a few events."""
    begin = Connection.connection_made

    def connection_made(self: Connection, transport: Any) -> None:
        begin(self, transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(0)

    monkeypatch.setattr(Connection, "connection_made", connection_made)
    with serving(make_engine()) as running:
        yield running


def test_a_slow_reader_gets_all_that_has_come_at_once(narrow_server: RunningServer) -> None:
    url, body = f"{narrow_server.url}/v1/completions", COMPLETION | {"max_tokens": 400}
    expected = httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"]
    host, port = narrow_server.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(request(json.dumps(body | {"stream": True}).encode(), HEAD.replace(b"1.1", b"1.0")))
        until(lambda: narrow_server.engine.num_requests == 1)
        assert text_of(ask(narrow_server)) in expected  # another client does not wait for the slow one
        until(lambda: narrow_server.engine.num_requests == 0)
        text = answer(slow).partition(b"\r\n\r\n")[2].decode()
    assert text_of(text) == expected
    assert len(chunks_of(text)) < 200


def test_an_error_in_one_stream_stays_there(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The call that brings the tokens of all streams writes their events, too."""
    write = Answer.write

    def failing(self: Answer, prompt_index: int, tokens: Any) -> bytes:
        if self.prompts[0][-1] == 1 and len(failing_after) > 5:
            raise RuntimeError("no such event")
        failing_after.append(None)
        return write(self, prompt_index, tokens)

    failing_after: list[None] = []
    monkeypatch.setattr(Answer, "write", failing)
    texts: list[str] = []
    other = threading.Thread(target=lambda: texts.append(ask(server, prompt=[2], max_tokens=400, logprobs=0)))
    other.start()
    until(lambda: bool(failing_after))
    *_, error = chunks_of(ask(server, prompt=[1], max_tokens=400, logprobs=0))
    other.join()
    assert error["error"]["message"] == "The server failed to answer this request."
    assert chunks_of(texts[0])[-1]["choices"][0]["finish_reason"] == "length"
    assert {record.name for record in caplog.records} == {"llama_te_infer.serve.logs"}  # nothing of asyncio's
    until(lambda: server.engine.num_requests == 0)


def test_no_keep_alives_while_tokens_come(make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that no task has sent count as well."""
    step = Engine.step

    def slow(self: Engine) -> Any:
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    with serving(make_engine(), keep_alive_interval=0.3) as server:
        assert ": keep-alive" not in ask(server, max_tokens=30)
