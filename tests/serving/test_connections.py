"""Connections that a client holds, breaks or floods: the server ends them, and no request of theirs stays."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from llama_te_infer import Engine
from llama_te_infer.serve.connections import Connection
from serving.conftest import RunningServer, serving
from serving.test_server import until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
LONG = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True}).encode()


def request(content: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


def connect(server: RunningServer, *sent: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    for part in sent:
        connection.sendall(part)
    return connection


def answer(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content


def status_of(content: bytes) -> int:
    return int(content.split(b" ", 2)[1])


def error_of(content: bytes) -> Any:
    return json.loads(content.partition(b"\r\n\r\n")[2])["error"]


def drip(connection: socket.socket, part: bytes) -> None:
    """Send the part again and again, at most for 30 seconds."""
    for _ in range(600):
        connection.sendall(part)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def busy_server(make_engine: Callable[..., Engine]) -> Iterator[RunningServer]:
    """Few rows and slow prefills, so that requests wait; at its end no page is in use."""
    with serving(make_engine(max_batch_size=2, prefill_budget=8)) as running:
        yield running


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("head_timeout", "body_timeout", "write_timeout"):
        monkeypatch.setattr(Connection, name, 0.2)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", HEAD])
def test_a_head_that_does_not_end(server: RunningServer, sent: bytes) -> None:
    with connect(server, sent) as connection:
        assert answer(connection) == b""


@pytest.mark.usefixtures("short")
def test_a_head_that_drips(server: RunningServer) -> None:
    with connect(server, HEAD) as connection, pytest.raises(ConnectionError):
        drip(connection, b"X-Drop: 1\r\n")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "sent", [HEAD + b"Content-Length: 10\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\r\n"]
)
def test_a_body_that_does_not_end(server: RunningServer, sent: bytes) -> None:
    with connect(server, sent) as connection:
        content = answer(connection)
    assert status_of(content) == 408 and error_of(content)["type"] == "timeout_error"


@pytest.mark.usefixtures("short")
def test_a_second_head_that_does_not_end(server: RunningServer) -> None:
    with connect(server, b"GET /version HTTP/1.1\r\nHost: a\r\n\r\nGET /ver") as connection:
        assert answer(connection).count(b"HTTP/1.1") == 1


@pytest.mark.usefixtures("short")
def test_a_body_that_goes_on_behind_its_refusal(make_engine: Callable[..., Engine]) -> None:
    with (
        serving(make_engine(), max_body_bytes=1000) as server,
        connect(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection,
        pytest.raises(ConnectionError),
    ):
        drip(connection, b"800\r\n" + b"a" * 0x800 + b"\r\n")


def test_requests_may_take_longer_than_their_body(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("head_timeout", "body_timeout", "write_timeout"):
        monkeypatch.setattr(Connection, name, 0.05)
    with httpx.Client() as client:
        for _ in range(2):
            found = client.post(
                f"{server.url}/v1/completions", content=LONG, headers={"Content-Type": "application/json"}, timeout=60
            )
            assert found.status_code == 200 and found.elapsed.total_seconds() > 0.05


@pytest.mark.usefixtures("short")
def test_a_reader_that_does_not_read() -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100):  # more than the buffers of both ends hold
            await send({"type": "http.response.body", "body": b"a" * 2**20, "more_body": True})

    async def main() -> None:
        server = uvicorn.Server(uvicorn.Config(endless, http=Connection, lifespan="off", port=0, log_level="critical"))
        running = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname(), limit=1)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        while not server.server_state.tasks:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            while server.server_state.tasks or server.server_state.connections:
                await asyncio.sleep(0.01)
        writer.close()
        server.should_exit = True
        await running

    asyncio.run(main())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000, 431),
        (b"GET /version HTTP/1.1\r\n\r\n", 400),  # no Host
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (b"GET /v1/models/../../etc/passwd HTTP/1.0\r\n\r\n", 404),
        (b"GET /v1/models/%2e%2e%2f%00%ff HTTP/1.0\r\n\r\n", 404),
        (b"GET http://other/v1/models/x HTTP/1.0\r\n\r\n", 404),
        (b"OPTIONS * HTTP/1.0\r\n\r\n", 404),
        (b"GET //health HTTP/1.0\r\n\r\n", 404),
    ],
)
def test_what_is_no_request(server: RunningServer, sent: bytes, status: int) -> None:
    with connect(server, sent) as connection:
        content = answer(connection)
    assert status_of(content) == status and error_of(content)["type"]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 405), ("OPTIONS", 405), ("DELETE", 405), ("NONSENSE", 405)])
def test_other_methods(server: RunningServer, method: str, status: int) -> None:
    assert httpx.request(method, f"{server.url}/v1/completions").status_code == status


def test_requests_in_a_row_on_one_connection(server: RunningServer) -> None:
    small = request(b'{"prompt": "a", "max_tokens": 2}')
    with connect(server, small * 3 + b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as connection:
        assert answer(connection).count(b"HTTP/1.1 200") == 4


def test_http_1_0(server: RunningServer) -> None:
    with connect(server, request(b'{"prompt": "a", "max_tokens": 2}', HEAD.replace(b"1.1", b"1.0"))) as connection:
        assert status_of(answer(connection)) == 200


def test_too_many_connections(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.1)  # connections of other tests are closed
    with connect(server):
        monkeypatch.setattr(Connection, "most", 1)
        with connect(server) as second:
            content = answer(second)
        assert (
            status_of(content) == 503
            and b"retry-after: 1" in content.lower()
            and "connections" in error_of(content)["message"]
        )
    monkeypatch.undo()
    assert httpx.get(f"{server.url}/version").status_code == 200


def test_hundreds_of_idle_connections_delay_nobody(server: RunningServer) -> None:
    idle = [connect(server, b"POST") for _ in range(300)]
    body = json.loads(LONG) | {"max_tokens": 3}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    for each in idle:
        each.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("stage", ["head", "body", "queue", "prefill", "decode", "beams", "stream"])
def test_a_client_that_leaves_leaves_nothing(
    busy_server: RunningServer, stage: str, leave: Callable[[socket.socket], None], capfd: pytest.CaptureFixture[str]
) -> None:
    engine, body = busy_server.engine, json.loads(LONG)
    if stage == "prefill":
        body |= {"prompt": [1] * 500, "max_tokens": 1}
    if stage == "beams":
        body |= {"use_beam_search": True, "best_of": 2}
    if stage == "stream":
        body |= {"stream": True}
    whole = request(json.dumps(body).encode())
    sent = {"head": whole[:30], "body": whole[:-5]}.get(stage, whole)
    others = [connect(busy_server, request(LONG)) for _ in range(2 if stage == "queue" else 0)]
    until(lambda: engine.num_requests == len(others))
    connection = connect(busy_server, sent)
    if stage not in ("head", "body"):
        until(lambda: engine.num_requests == len(others) + 1)
        if stage in ("decode", "beams", "stream"):
            until(lambda: bool(engine.engine.scheduler.rows))
    leave(connection)
    until(lambda: engine.num_requests <= len(others))
    for each in others:
        each.close()
    until(lambda: engine.num_requests == 0 and not engine.engine.has_unfinished)
    connection.close()
    assert "Traceback" not in capfd.readouterr().err
