"""An engine for asyncio: one thread steps it, and tasks of any event loop pass their requests to that thread.

    async with AsyncEngine(engine) as requests:
        async for events in await requests.stream("The sky is blue because"):
            print("".join(event.text for event in events), end="")

After each step the thread hands all new tokens of an event loop over in one call, so the number of calls does not grow
with the number of requests.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..sampling_params import SamplingParams
from .engine import Engine
from .outputs import RequestOutput, TokenEvent
from .tokenization import Prompt, tokens_of_chats, tokens_of_prompt


class EngineFailedError(RuntimeError):
    """A step of the engine failed, such as for want of memory; all requests that ran have ended. See `__cause__`."""


class QueueFullError(RuntimeError):
    """As many requests run and wait as are allowed."""


class DrainingError(RuntimeError):
    """The engine takes no more requests, since it is about to end."""


class _Mailbox:
    """What the engine's thread has brought for one request. All but `request_id` belongs to the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: list[TokenEvent] = []
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.request_id: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.output is not None or self.error is not None

    def take(self, news: _News) -> None:
        self.events += news.events
        self.output, self.error = news.output, news.error
        if self.waiter is not None:
            _wake(self.waiter)


class _News:
    """What a step has brought for one request."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.output: RequestOutput | None = None
        self.error: Exception | None = None


class RequestStream(AsyncIterator[list[TokenEvent]]):
    """The events of one request; each item has all events since the last one, so a slow reader delays nobody.

    At most all events of the request wait. The request ends when the stream is closed or dropped.
    """

    def __init__(self, mailbox: _Mailbox, cancel: Callable[[_Mailbox], None]) -> None:
        self._mailbox, self._cancel = mailbox, cancel
        self._is_closed = False

    @property
    def request_id(self) -> int:
        """The engine's id of the request."""
        assert self._mailbox.request_id is not None
        return self._mailbox.request_id

    @property
    def output(self) -> RequestOutput | None:
        """The complete output, once the request has ended."""
        return self._mailbox.output

    def __aiter__(self) -> RequestStream:
        """Return the stream itself."""
        return self

    async def __anext__(self) -> list[TokenEvent]:
        """Return the events since the last call, at least one.

        Raises:
            EngineFailedError: A step failed.
        """
        while not (events := await self.next(None)):
            if self._mailbox.is_complete or self._is_closed:
                raise StopAsyncIteration
        return events

    async def next(self, timeout: float | None) -> list[TokenEvent]:
        """Return the events since the last call; none at the end, or if none has come in time.

        Args:
            timeout: Most seconds to wait; `None` for any time.

        Raises:
            EngineFailedError: A step failed.
        """
        box = self._mailbox
        if not box.events and not box.is_complete and not self._is_closed:
            box.waiter = box.loop.create_future()
            timer = None if timeout is None else box.loop.call_later(timeout, _wake, box.waiter)
            try:
                await box.waiter
            finally:
                if timer is not None:
                    timer.cancel()
        if not box.events and box.error is not None:
            raise box.error
        events, box.events = box.events, []
        return events

    async def finish(self) -> RequestOutput:
        """Wait for the end of the request, and return its complete output.

        If the waiting task is cancelled, the request ends.

        Raises:
            EngineFailedError: A step failed.
        """
        try:
            async for _ in self:
                pass
        finally:
            self.close()
        assert self.output is not None
        return self.output

    def close(self) -> None:
        """End the request before the next step, if it has not ended. No events follow."""
        if not self._is_closed:
            self._is_closed = True
            if not self._mailbox.is_complete:
                self._cancel(self._mailbox)

    def __del__(self) -> None:
        # The garbage collector may call this from any thread.
        self.close()


class AsyncEngine:
    """Runs an engine in a thread of its own.

    Tasks of several event loops in several threads may use it. Nobody else may use the engine meanwhile.

    Args:
        engine: The engine.
        max_requests: Most requests that run and wait at a time; `None` for any number.

    Attributes:
        engine: The engine.
        failure: The error of the last step, if that step failed. After an error of a CUDA device the thread has ended,
            and no request can run.
    """

    def __init__(self, engine: Engine, *, max_requests: int | None = None) -> None:
        if max_requests is not None and max_requests < 1:
            raise ValueError(f"max_requests={max_requests!r} is not possible: give an integer of at least 1, or None.")
        self.engine, self.max_requests = engine, max_requests
        self.failure: Exception | None = None
        # The engine's thread decodes while this thread tokenizes, and one tokenizer cannot always do both.
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._accepted = 0  # requests that run or wait
        self._is_draining = self._is_closing = self._has_ended = False
        # The engine's thread alone uses these.
        self._mailboxes: dict[int, _Mailbox] = {}
        self._news: dict[_Mailbox, _News] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        """Return the engine itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel all requests, and end the thread."""
        await asyncio.to_thread(self.close)

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return self._accepted

    @property
    def is_alive(self) -> bool:
        """Whether requests can run: not after `close`, and not after the GPU has failed."""
        return not self._has_ended

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt, without stopping the event loop meanwhile.

        Args:
            prompt: As in `Engine.submit`.
            add_special_tokens: Whether a text gets the special tokens that the tokenizer adds.

        Raises:
            ValueError: It is no prompt, or a text and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return tokens_of_prompt(prompt, self._tokenizer, self.engine.max_sequence_length)

        def tokens() -> list[int]:
            if add_special_tokens or self._tokenizer is None:
                return tokens_of_prompt(prompt, self._tokenizer, self.engine.max_sequence_length)
            return list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])

        return await self._in_tokenizer_thread(tokens)

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the tokens of a conversation.

        Args:
            messages: Dicts with "role" and "content".
            options: Of transformers' `apply_chat_template`.

        Raises:
            ValueError: The messages do not fit, or there is no tokenizer with a chat template.
        """
        return await self._in_tokenizer_thread(
            lambda: tokens_of_chats(messages, self._tokenizer, self.engine.max_sequence_length, **options)[0]
        )

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestStream:
        """Begin a request; return once the engine has accepted it.

        Args:
            prompt: As in `Engine.submit`.
            params: How to continue it.

        Raises:
            ValueError: The request does not fit the engine or the model.
            QueueFullError: There are `max_requests` requests.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The engine cannot run any more.
        """
        self._accept()
        try:
            tokens = await self.tokenize(prompt)
        except BaseException:
            self._release(1)
            raise
        # From here on the engine's thread counts the request, also if this task is cancelled.
        mailbox = _Mailbox()
        stream = RequestStream(mailbox, self._cancel)
        try:
            await self._call(lambda: self._submit(mailbox, tokens, params))
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Continue one prompt, and return its complete output. Raises as `stream` does, and as its iteration."""
        return await (await self.stream(prompt, params)).finish()

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """Answer one conversation. Raises as `generate` does.

        Args:
            messages: Dicts with "role" and "content".
            params: How to answer.
            options: Of transformers' `apply_chat_template`; `add_generation_prompt` is true by default.
        """
        options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
        return await self.generate(await self.tokenize_chat(messages, **options), params)

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait for the end of those that run and wait.

        Args:
            timeout: Most seconds to wait; then the rest is cancelled.

        Returns:
            Whether all have ended by themselves.
        """
        self._is_draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._accepted and (end is None or time.monotonic() < end):
            await asyncio.sleep(0.01)
        has_ended = not self._accepted
        if not has_ended:
            await self._call(self._cancel_all)
        return has_ended

    def close(self) -> None:
        """Cancel all requests, and end the thread. Blocks until a step in progress is done."""
        self._is_draining = True
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()
        self._tokenizing.shutdown()

    # --- from an event loop to the thread -----------------------------------------------------------------------------

    def _accept(self) -> None:
        with self._wake:  # several event loops may come at once
            self._refuse_late_requests()
            if self.max_requests is not None and self._accepted >= self.max_requests:
                raise QueueFullError(f"{self._accepted} requests run and wait, which is the limit: try again later.")
            self._accepted += 1

    def _release(self, count: int) -> None:
        with self._wake:
            self._accepted -= count

    def _refuse_late_requests(self) -> None:
        if self._has_ended and self.failure is not None:
            raise EngineFailedError("the engine has ended, since its GPU failed") from self.failure
        if self._is_draining:
            raise DrainingError("the engine is about to end and takes no more requests.")

    async def _in_tokenizer_thread(self, function: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)

    async def _call(self, function: Callable[[], None]) -> None:
        """Run a function in the engine's thread before its next step."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if answer.done():
                return  # the caller has been cancelled
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

        def command() -> None:
            error = None
            try:
                function()
            except Exception as caught:
                error = caught
            _tell(loop, settle, error)

        self._command(command)
        await answer

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if not self._has_ended:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # it finds no requests

    def _cancel(self, mailbox: _Mailbox) -> None:
        def command() -> None:
            if mailbox.request_id in self._mailboxes:
                self.engine.cancel(mailbox.request_id)

        self._command(command)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.engine.model.device.type == "cuda":
            import torch

            torch.cuda.set_device(self.engine.model.device)
        while not self._has_ended:
            with self._wake:
                while not (self._commands or self._is_closing or self.engine.has_unfinished):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                is_closing = self._is_closing  # once: who sets it later is heard in the next round
            for command in commands:
                command()
            if is_closing:
                self._cancel_all()
            if self.engine.has_unfinished:
                self._step()
            self._deliver()
            if is_closing or (self.failure is not None and _has_lost_device(self.engine)):
                with self._wake:
                    self._has_ended = True
                    commands = self._commands
                for command in commands:
                    command()

    def _submit(self, mailbox: _Mailbox, tokens: list[int], params: SamplingParams | None) -> None:
        try:
            if self._has_ended or self._is_closing:
                self._refuse_late_requests()
            mailbox.request_id = self.engine.submit(
                tokens, params, lambda event: self._news_of(mailbox).events.append(event)
            )
        except BaseException:
            self._release(1)
            raise
        self._mailboxes[mailbox.request_id] = mailbox

    def _cancel_all(self) -> None:
        for request_id in list(self._mailboxes):
            self.engine.cancel(request_id)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:  # the engine has dropped all requests
            self.failure = error
            for mailbox in self._mailboxes.values():
                failed = EngineFailedError(f"a step of the engine failed: {error}")
                failed.__cause__ = error
                self._news_of(mailbox).error = failed
            self._mailboxes.clear()
            return
        self.failure = None
        for output in outputs:
            self._news_of(self._mailboxes.pop(output.request_id)).output = output

    def _news_of(self, mailbox: _Mailbox) -> _News:
        return self._news.setdefault(mailbox, _News())

    def _deliver(self) -> None:
        """Hand the news over, with one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, _News]]] = {}
        for mailbox, news in self._news.items():
            by_loop.setdefault(mailbox.loop, []).append((mailbox, news))
        self._release(sum(news.output is not None or news.error is not None for news in self._news.values()))
        self._news.clear()
        for loop, each in by_loop.items():
            _tell(loop, _take_all, each)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _take_all(each: list[tuple[_Mailbox, _News]]) -> None:
    for mailbox, news in each:
        mailbox.take(news)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Let an event loop call a function, unless the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


def _has_lost_device(engine: Engine) -> bool:
    """Return whether the model's GPU computes nothing any more, as after an illegal memory access."""
    import torch

    if engine.model.device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(engine.model.device)
    except Exception:
        return True
    return False
