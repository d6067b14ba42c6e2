"""How the generating endpoints send an answer: they read a request, run it, and answer whole or in events."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..engine.client import RequestStream
from ..engine.outputs import RequestOutput
from .answers import Answer
from .connections import SEND_PART
from .errors import api_error_of
from .protocol.sampling import GeneratingFields
from .server import Server, while_connected
from .streams import KEEP_ALIVE

Body = TypeVar("Body", bound=GeneratingFields)


async def respond(
    request: Request, body_class: type[Body], make: Callable[[Server, Body, str], Awaitable[Answer]]
) -> Response:
    """Answer a request of a generating endpoint.

    Args:
        request: The request.
        body_class: Its pydantic model.
        make: Makes the answer of the server, the request's body and the model's name.

    Raises:
        ApiError: The request is refused, or failed before anything was sent.
    """
    server: Server = request.app.state.server
    body = await server.read(request, body_class)
    answer = await make(server, body, server.model_name(body.model))
    streams = await server.begin(answer.prompts, answer.params)
    if body.stream:
        return EventStream(answer, streams)
    outputs = await server.finish(request, streams)
    answer.usage.cached = _cached(outputs)
    return JSONResponse(answer.whole(outputs))


class EventStream(Response):
    """Sends an answer in events as tokens come. Its requests end if the client leaves.

    Hundreds of streams get a token at each step of the engine. So no task wakes for a token: the call that brings the
    token sends it, if the connection has `SEND_PART` and the client keeps up. Otherwise the tokens wait for this
    response's task, which sends them all at once.

    Args:
        answer: Writes the events.
        streams: The requests of the engine, one for each prompt.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, streams: Sequence[RequestStream]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # the second one is nginx's
        del self.headers["Content-Length"]
        self._answer, self._streams = answer, streams
        self._interval = answer.server.settings.keep_alive_interval
        self._send_part: Callable[[bytes], bool] | None = None
        # Of the task while it has nothing to do. Its result is what the task sends before it looks for tokens, or an
        # error that the task raises: asyncio would log an exception of the future if the task has been cancelled.
        self._waiter: asyncio.Future[bytes | Exception | None] | None = None
        self._last = 0.0  # when something was sent, in seconds of `time.monotonic()`

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        self._send_part = scope.get("extensions", {}).get(SEND_PART)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            with suppress(ClientDisconnect):
                await while_connected(receive, self._send_body(send))
        finally:
            for stream in self._streams:
                stream.close()

    async def _send_body(self, send: Send) -> None:
        async def send_part(part: bytes, is_last: bool = False) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": not is_last})

        answer = self._answer
        try:
            async with asyncio.timeout(answer.server.settings.request_timeout):
                for part in answer.begin():
                    await send_part(part)
                await self._send_tokens(send_part)
            outputs = [stream.output for stream in self._streams]
            for output in outputs:
                assert output is not None
                answer.server.check_output(output)
            answer.usage.cached = _cached(outputs)
            last = answer.end()
        except Exception as error:
            # The status has been sent, so an event says what has happened.
            last = answer.failure(api_error_of(error))
        await send_part(b"".join(last), is_last=True)

    async def _send_tokens(self, send_part: Callable[[bytes], Awaitable[None]]) -> None:
        for index, stream in enumerate(self._streams):
            stream.listen(functools.partial(self._take, index))
        is_complete = False
        while not is_complete:
            is_complete = all(stream.is_complete for stream in self._streams)
            part = b"".join(map(self._events_of, range(len(self._streams)))) or None
            if part is None and not is_complete:
                part = await self._wait()
            if part is not None:
                await send_part(part)

    def _take(self, index: int) -> None:
        """Send what has come for a request, or wake the task. The task itself looks for tokens before it waits."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._send_part is None or self._streams[index].is_complete:
                waiter.set_result(None)
            elif part := self._events_of(index):
                self._last = time.monotonic()
                if not self._send_part(part):
                    waiter.set_result(b"")  # the task can send this once the client has caught up
        except Exception as error:
            waiter.set_result(error)

    async def _wait(self) -> bytes | None:
        """Wait until the task has something to do, and return what it sends first, if anything."""
        self._waiter, self._last = asyncio.get_running_loop().create_future(), time.monotonic()
        try:
            while not self._waiter.done():
                rest = self._last + self._interval - time.monotonic()
                if rest <= 0:
                    return KEEP_ALIVE
                await asyncio.wait([self._waiter], timeout=rest)
            result = self._waiter.result()
            if isinstance(result, Exception):
                raise result
            return result
        finally:
            self._waiter = None

    def _events_of(self, prompt_index: int) -> bytes:
        """Return the events for all tokens that have come for a prompt."""
        tokens = self._streams[prompt_index].take()
        return self._answer.write(prompt_index, tokens) if tokens else b""


def _cached(outputs: Sequence[RequestOutput | None]) -> int:
    """Return how many tokens of the prompts came from the prefix cache."""
    return sum(output.num_cached_tokens for output in outputs if output is not None)
