"""Connections to clients: how long the server waits for a slow one, and how many there may be."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .errors import ApiError

# The key of a function among the ASGI extensions of a request. After the response's start, the function sends a part of
# the body at once. It returns whether the client keeps up; if not, the next message waits until the client does.
SEND_PART = "llama_te.send_part"


class Connection(H11Protocol):
    """A client's connection.

    uvicorn waits for any time for the head and the body of a request, and for a client that does not read. A client can
    hold the connection, and the memory behind it, as long as it likes. This class ends such connections.

    Attributes:
        head_timeout: Seconds from the beginning of a connection, or from the first byte of a later request, to the end
            of the request's head.
        body_timeout: Seconds from there to the end of its body.
        write_timeout: Seconds in which a client may leave a full buffer of its answer unread.
        most: Connections at a time; a further one gets status 503.
    """

    head_timeout = 15.0
    body_timeout = 60.0
    write_timeout = 60.0
    most = 4096

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _awaited: type[h11.IDLE] | type[h11.SEND_BODY] | None = None  # the part of a request that a timer waits for

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._application, self.app = self.app, self._run

    async def _run(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = {SEND_PART: self._send_part}
        await self._application(scope, receive, send)

    def _send_part(self, part: bytes) -> bool:
        """Do what `SEND_PART` says."""
        if not self.cycle.disconnected:
            # As h11 would frame it, in a tenth of the time.
            is_chunked = self.scope["http_version"] >= "1.1"
            self.transport.write(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
        return not self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(ApiError(503, "The server has too many connections: try again later."))
        self._follow()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """Go on, since the client has read."""
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without a further request."""
        super().timeout_keep_alive_handler()
        self._expect_reader()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(ApiError(status, f"This is no valid HTTP request: {error}."))

    # --- time-outs ----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Start or stop the timer for the part of a request that is about to come."""
        if self.transport.is_closing():
            self._expect_reader()
        awaited = self._what_is_awaited()
        if awaited is self._awaited:
            return
        self._awaited = awaited
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if awaited is not None:
            seconds = self.body_timeout if awaited is h11.SEND_BODY else self.head_timeout
            self._reading = self.loop.call_later(seconds, self._end_reading)

    def _what_is_awaited(self) -> type[h11.IDLE] | type[h11.SEND_BODY] | None:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.SEND_BODY:
            return h11.SEND_BODY
        # Between requests uvicorn has a timer of its own, until the first byte.
        is_between = self.timeout_keep_alive_task is not None
        return h11.IDLE if self.conn.their_state is h11.IDLE and not is_between else None

    def _end_reading(self) -> None:
        if self._awaited is h11.SEND_BODY:
            message = f"The body has taken longer than {self.body_timeout:g} s, which is the limit."
            self._refuse(ApiError(408, message))
        else:
            self.transport.close()
        self._follow()

    def _expect_reader(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.write_timeout, self.transport.abort)

    # --- answers of the connection itself -----------------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        """Answer in the place of the application, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(error.body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(content)),
                "connection": "close",
                **error.headers,
            }
            head = h11.Response(
                status_code=error.status, headers=list(headers.items()), reason=STATUS_PHRASES[error.status]
            )
            for event in (head, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()  # an application that reads the body learns of it, as when a client leaves
