"""The HTTP server: it says when it is ready, drains at a signal, and ends when the engine's GPU is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ..engine.client import EngineClient
from .connections import Connection

SECONDS_FOR_LAST_BYTES = 5  # to send the end of the last answers, after draining


class HttpServer(uvicorn.Server):
    """A uvicorn server in front of an engine.

    At the first SIGTERM or SIGINT new requests get status 503 and running ones finish; at the second one the server
    ends at once.

    Args:
        config: uvicorn's.
        engine: The engine behind the application.
        drain_timeout: Most seconds that running requests get after the first signal.
        when_ready: Called once with the server's port when it takes requests.
    """

    def __init__(
        self, config: uvicorn.Config, engine: EngineClient, drain_timeout: float, when_ready: Callable[[int], None]
    ) -> None:
        config.timeout_graceful_shutdown = SECONDS_FOR_LAST_BYTES
        config.http, config.ws = Connection, "none"
        super().__init__(config)
        self._engine, self._drain_timeout, self._when_ready = engine, drain_timeout, when_ready
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._when_ready(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Receive a signal."""
        if self._draining is None and self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self._begin_draining)
        else:
            self.should_exit = self.force_exit = True

    def _begin_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._engine.drain(self._drain_timeout)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends; uvicorn asks ten times a second."""
        return await super().on_tick(counter) or not self._engine.is_alive
