"""The server's end: it starts the engine's process, and passes requests and events between the two."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from ...engine.client import (
    ENDING,
    DrainingError,
    EndFor,
    EngineClient,
    EngineFailedError,
    EventFor,
    Mailbox,
    hand_over,
    sort_news,
)
from ...engine.control import Control
from ...engine.statistics import EngineStats
from ...sampling_params import SamplingParams, checked_params
from ..loading import load_tokenizer
from ..settings import EngineSettings
from .messages import (
    Accepted,
    Ask,
    Cancel,
    Done,
    FromEngine,
    FromServer,
    Incoming,
    Load,
    Loading,
    NotLoaded,
    Ready,
    Refused,
    Step,
    Submit,
    encode,
)

SECONDS_TO_END = 10  # for the engine's process, after the connection is closed


class EngineProcess(EngineClient):
    """An engine in a process of its own. Tasks of the event loop that started it may use it.

    Attributes:
        description: The engine's sizes and memory, in words.
        sampling_defaults: Fields of `SamplingParams` that the checkpoint sets.
        failure: The error of the last step, if that step failed, or the reason why the process has ended.
    """

    def __init__(self, wire: Wire, ready: Ready, tokenizer: Any | None, max_requests: int | None) -> None:
        super().__init__(tokenizer, ready.max_sequence_length, max_requests)
        self.description, self.sampling_defaults = ready.description, ready.sampling_defaults
        self._wire, self._loop = wire, asyncio.get_running_loop()
        self._stats = ready.stats
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[Mailbox, asyncio.Future[None]]] = {}  # by the request's number
        self._mailboxes: dict[int, Mailbox] = {}  # by the engine's id
        self._controls: dict[int, asyncio.Future[None]] = {}  # by their numbers
        self._has_ended = self._is_closing = False
        wire.receive, wire.when_closed = self._receive, self._end

    @classmethod
    async def start(
        cls,
        settings: EngineSettings,
        *,
        max_requests: int | None = None,
        say: Callable[[str], None] = lambda stage: None,
    ) -> EngineProcess:
        """Start the process, and wait until it takes requests. This process loads the tokenizer meanwhile.

        Args:
            settings: The operator's settings.
            max_requests: Most requests that run and wait at a time; `None` for any number.
            say: Called with what the process is about to do, in words.

        Raises:
            OSError: There is no such checkpoint.
            ValueError: A setting or the checkpoint does not fit.
            EngineFailedError: The process could not load the model for another reason.
        """
        wire = await Wire.to_new_process()
        try:
            wire.send(Load(settings))
            ready, tokenizer = await asyncio.gather(wire.ready(say), asyncio.to_thread(load_tokenizer, settings))
            return cls(wire, ready, tokenizer, max_requests)
        except BaseException:
            wire.close()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._wire.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether requests can run: not after `close`, and not after the process has ended."""
        return not self._has_ended

    def stats(self) -> EngineStats:
        """Return the load of the engine after its last step, and what it has counted."""
        return self._stats

    def close(self) -> None:
        """Cancel all requests, and end the process."""
        self._is_draining = self._is_closing = True
        self._wire.close()
        self._tokenizing.shutdown()

    # --- to the engine ------------------------------------------------------------------------------------------------

    async def _submit(self, mailbox: Mailbox, tokens: list[int], params: SamplingParams | None) -> None:
        try:
            self._refuse_late_requests()
            message = Submit(next(self._numbers), tokens, checked_params(params), mailbox.arrival)
            self._wire.send(message)
        except OverflowError:  # `SamplingParams` has no such numbers
            self._release(1)
            raise ValueError("prompt has a token that is no number of 64 bits: give the model's tokens.") from None
        except BaseException:
            self._release(1)
            raise
        answer = self._loop.create_future()
        self._asked[message.number] = mailbox, answer
        await answer

    def _cancel(self, mailbox: Mailbox) -> None:
        # The garbage collector may call this from any thread, also after the event loop has ended.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send_cancel, mailbox)

    def _send_cancel(self, mailbox: Mailbox) -> None:
        if mailbox.request_id in self._mailboxes:
            self._wire.send(Cancel(mailbox.request_id))

    async def _cancel_all(self) -> None:
        for mailbox in self._mailboxes.values():
            self._send_cancel(mailbox)

    async def _control(self, control: Control) -> None:
        number, answer = next(self._numbers), self._loop.create_future()
        self._wire.send(Ask(number, control))
        self._controls[number] = answer
        await answer

    # --- from the engine ----------------------------------------------------------------------------------------------

    def _receive(self, messages: list[FromEngine]) -> None:
        # Where this process falls behind, several steps come together. Each stream writes once for all of them, which
        # takes little more time than for one step: so this process catches up.
        events: list[EventFor] = []
        ends: list[EndFor] = []
        for message in messages:
            match message:
                case Step():
                    self.failure = message.news.failure
                    self._stats = message.news.stats or self._stats
                    new_events, new_ends = sort_news(message.news, self._mailboxes)
                    events += new_events
                    ends += new_ends
                case Accepted():
                    mailbox, answer = self._asked.pop(message.number)
                    mailbox.request_id = message.request_id
                    self._mailboxes[message.request_id] = mailbox
                    if answer.done():  # the caller has been cancelled meanwhile
                        self._send_cancel(mailbox)
                    else:
                        answer.set_result(None)
                case Refused():
                    _, answer = self._asked.pop(message.number)
                    self._release(1)
                    if not answer.done():
                        answer.set_exception(message.error)
                case Done():
                    self._control_state = message.state
                    answer = self._controls.pop(message.number)
                    if answer.done():
                        continue
                    if message.error is None:
                        answer.set_result(None)
                    else:
                        answer.set_exception(message.error)
        hand_over(events, ends)
        self._release(len(ends))

    def _end(self, reason: str) -> None:
        """End all requests, since the process has ended."""
        self._has_ended = True
        error: Exception
        if self._is_closing:
            error = DrainingError(ENDING)
        else:
            error = EngineFailedError(reason)
            self.failure = self.failure or error
        hand_over([], [(mailbox, None, error) for mailbox in self._mailboxes.values()])
        for answer in (*(answer for _, answer in self._asked.values()), *self._controls.values()):
            if not answer.done():
                answer.set_exception(error)
        self._release(len(self._mailboxes) + len(self._asked))
        self._mailboxes.clear()
        self._asked.clear()
        self._controls.clear()


class Wire(asyncio.Protocol):
    """The engine's process, and the connection to it.

    Attributes:
        process: The process.
        receive: Called with the messages that have come together.
        when_closed: Called once with the reason, in words, when the process has ended.
    """

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self.process, self._connection = process, connection
        self.receive: Callable[[list[FromEngine]], None] = lambda messages: None
        self.when_closed: Callable[[str], None] = lambda reason: None
        self._incoming = Incoming()
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def to_new_process(cls) -> Wire:
        """Start an engine's process."""
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", "llama_te_infer.serve.engine_process", str(there.fileno())]
            process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        wire = cls(process, here)
        await asyncio.get_running_loop().create_unix_connection(lambda: wire, sock=here)
        return wire

    async def ready(self, say: Callable[[str], None]) -> Ready:
        """Wait until the process takes requests.

        Args:
            say: See `EngineProcess.start`.

        Raises:
            OSError: See there.
            ValueError: See there.
            EngineFailedError: See there.
        """
        answer: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()

        def receive(messages: list[FromEngine]) -> None:
            for message in messages:
                match message:
                    case Loading():
                        say(message.stage)
                    case Ready():
                        answer.set_result(message)
                    case NotLoaded(error):
                        is_users = isinstance(error, (OSError, ValueError))
                        answer.set_exception(
                            error if is_users else EngineFailedError(f"the engine has not started: {error}")
                        )

        def lose(reason: str) -> None:
            if not answer.done():
                answer.set_exception(EngineFailedError(f"{reason} before it was ready."))

        self.receive, self.when_closed = receive, lose
        return await answer

    def send(self, message: FromServer) -> None:
        """Send a message."""
        assert self._transport is not None
        self._transport.write(encode(message))

    def close(self) -> None:
        """End the process, and wait until it has ended. Any thread may call this."""
        with suppress(OSError):  # the process has ended already
            self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # --- asyncio's protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's transports are no subclasses

    def data_received(self, data: bytes) -> None:
        """Pass on the messages that are complete."""
        if messages := self._incoming.add(data):
            self.receive(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say how the process has ended."""
        self.when_closed(_how_it_ended(self.process))


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Return in words how a process has ended that has closed its connection."""
    try:
        status = process.wait(1)  # it closes the connection a moment before
    except subprocess.TimeoutExpired:
        return "the engine's process has closed its connection"
    how = f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"status {status}"
    return f"the engine's process has ended with {how}"
