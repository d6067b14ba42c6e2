"""Server-sent events: the format, keep-alives, and the end of a stream that fails.

The format is that of the WHATWG's HTML standard, section 9.2; the last event "[DONE]" is OpenAI's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse

from ..engine.client import RequestStream
from ..engine.outputs import TokenEvent
from .errors import ApiError, api_error_of
from .server import Server, check_output

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
# Some clients take these characters for the end of a line.
_LINE_SEPARATORS = [(each.encode(), json.dumps(each)[1:-1].encode()) for each in "\x85\u2028\u2029"]
_encode = msgspec.json.Encoder().encode  # a tenth of the time of `json.dumps`


def event(content: dict[str, Any]) -> bytes:
    """Return one event."""
    encoded = _encode(content)
    if not encoded.isascii():
        for separator, escaped in _LINE_SEPARATORS:
            encoded = encoded.replace(separator, escaped)
    return b"data: " + encoded + b"\n\n"


def typed_event(content: dict[str, Any]) -> bytes:
    """Return one event whose name is its content's type."""
    return b"event: " + content["type"].encode() + b"\n" + event(content)


def event_stream(
    streams: Sequence[RequestStream],
    parts: AsyncIterator[bytes],
    failure: Callable[[ApiError], Iterable[bytes]],
) -> StreamingResponse:
    """Return the response for some requests of the engine; they end if the client leaves.

    Args:
        streams: The requests.
        parts: The content.
        failure: Returns the last parts of a stream that fails: its status has been sent, so it says what has happened.
    """
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second one is nginx's
    return StreamingResponse(_guarded(streams, parts, failure), media_type="text/event-stream", headers=headers)


async def _guarded(
    streams: Sequence[RequestStream], parts: AsyncIterator[bytes], failure: Callable[[ApiError], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    try:
        async for part in parts:
            yield part
    except Exception as error:
        for part in failure(api_error_of(error)):
            yield part
    finally:
        for stream in streams:
            stream.close()


async def events_of(server: Server, streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """Yield the events of requests, each batch with the number of its request; empty batches for keep-alives.

    Raises:
        TimeoutError: The requests take longer than the server allows.
        ApiError: A request failed.
    """
    interval, limit = server.settings.keep_alive_interval, server.settings.request_timeout
    end = None if limit is None else time.monotonic() + limit
    batches = [_batches(stream, interval, end) for stream in streams]
    if len(batches) == 1:
        async for events in batches[0]:
            yield 0, events
    else:
        async for index, events in _merged(batches):
            yield index, events
    for stream in streams:
        assert stream.output is not None
        check_output(stream.output)


def by_choice(events: Sequence[TokenEvent]) -> dict[int, list[TokenEvent]]:
    """Return the events of each of a request's choices."""
    choices: dict[int, list[TokenEvent]] = {}
    for each in events:
        choices.setdefault(each.index, []).append(each)
    return choices


async def _merged(batches: Sequence[AsyncIterator[list[TokenEvent]]]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    waiting = {asyncio.ensure_future(anext(each)): index for index, each in enumerate(batches)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    events = await task
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(batches[index]))] = index
                yield index, events
    finally:
        for task in waiting:
            task.cancel()


async def _batches(stream: RequestStream, interval: float, end: float | None) -> AsyncIterator[list[TokenEvent]]:
    while True:
        rest = interval if end is None else min(interval, end - time.monotonic())
        if rest <= 0:
            raise TimeoutError
        events = await stream.next(rest)
        if not events and stream.output is not None:
            return
        yield events
