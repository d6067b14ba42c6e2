"""What a server asks of an engine, wherever the engine runs: requests, streams, admission, tokenizing, draining.

Importing this module does not import torch.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..sampling_params import SamplingParams
from .control import Control, ControlState, PauseMode
from .outputs import News, RequestOutput, TokenEvent
from .statistics import EngineStats
from .tokenization import Prompt, tokens_of_chats, tokens_of_prompt, tokens_of_text

ENDING = "the engine is about to end and takes no more requests."


class EngineFailedError(RuntimeError):
    """A step of the engine failed, such as for want of memory; all requests that ran have ended. See `__cause__`."""


class QueueFullError(RuntimeError):
    """As many requests run and wait as are allowed."""


class DrainingError(RuntimeError):
    """The engine takes no more requests, since it is about to end."""


# Gets the output of a request, or `None` and the error of the step that lost the request.
OnEnd = Callable[[RequestOutput | None, Exception | None], None]


class Mailbox:
    """What the engine has brought for one request. All but `request_id` belongs to the event loop.

    Args:
        on_end: Called when the request has ended.

    Attributes:
        loop: The event loop of the request's task.
        arrival: When the request arrived, in seconds of `time.monotonic()`.
        request_id: The engine's id, once it has accepted the request.
        events: Those that nobody has read yet.
        output: Once the request has ended.
        error: Instead of an output, if a step failed.
        listener: Called when events or the end have come. It must not raise.
    """

    def __init__(self, on_end: OnEnd | None) -> None:
        self._on_end = on_end
        self.loop = asyncio.get_running_loop()
        self.arrival = time.monotonic()
        self.request_id: int | None = None
        self.events: list[TokenEvent] = []
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.listener: Callable[[], None] = lambda: None

    @property
    def is_complete(self) -> bool:
        """Whether the request has ended."""
        return self.output is not None or self.error is not None

    def end(self, output: RequestOutput | None, error: Exception | None) -> None:
        """Receive the end of the request."""
        self.output, self.error = output, error
        if self._on_end is not None:
            self._on_end(output, error)

    async def wait(self, for_end: bool = False) -> None:
        """Wait for events or the end of the request.

        Args:
            for_end: Wait for the end alone, and drop the events.
        """
        waiter = self.loop.create_future()

        def listen() -> None:
            if for_end:
                self.events.clear()
            if not waiter.done() and (self.is_complete or not for_end):
                waiter.set_result(None)

        self.listener = listen
        await waiter


EventFor = tuple[Mailbox, TokenEvent]
EndFor = tuple[Mailbox, RequestOutput | None, Exception | None]


def sort_news(news: News, mailboxes: dict[int, Mailbox]) -> tuple[list[EventFor], list[EndFor]]:
    """Return the events and the ends of requests with their mailboxes. Requests that have ended leave `mailboxes`."""
    events = [(mailboxes[event.request_id], event) for event in news.events]
    ends: list[EndFor] = [(mailboxes.pop(output.request_id), output, None) for output in news.outputs]
    for request_id in news.lost:
        assert news.failure is not None
        ends.append((mailboxes.pop(request_id), None, step_failed(news.failure)))
    return events, ends


def hand_over(events: list[EventFor], ends: list[EndFor]) -> None:
    """Put news into mailboxes, and tell each that has any once. The event loop of the mailboxes calls this."""
    has_news: dict[Mailbox, None] = {}
    for mailbox, event in events:
        mailbox.events.append(event)
        has_news[mailbox] = None
    for mailbox, output, error in ends:
        mailbox.end(output, error)
        has_news[mailbox] = None
    for mailbox in has_news:
        mailbox.listener()


class RequestStream(AsyncIterator[list[TokenEvent]]):
    """The events of one request; each item has all events since the last one, so a slow reader delays nobody.

    At most all events of the request wait. The request ends when the stream is closed or dropped.
    """

    def __init__(self, mailbox: Mailbox, cancel: Callable[[Mailbox], None]) -> None:
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

    @property
    def is_complete(self) -> bool:
        """Whether the request has ended, with an output or in a step that failed."""
        return self._mailbox.is_complete

    def __aiter__(self) -> RequestStream:
        """Return the stream itself."""
        return self

    async def __anext__(self) -> list[TokenEvent]:
        """Return the events since the last call, at least one.

        Raises:
            EngineFailedError: A step failed.
        """
        while not (events := self.take()):
            if self.is_complete or self._is_closed:
                raise StopAsyncIteration
            await self._mailbox.wait()
        return events

    def listen(self, listener: Callable[[], None]) -> None:
        """Let the event loop call a function whenever events or the end have come; no task iterates then.

        Args:
            listener: It calls `take`, and raises nothing.
        """
        self._mailbox.listener = listener

    def take(self) -> list[TokenEvent]:
        """Return the events since the last call, without waiting.

        Raises:
            EngineFailedError: A step failed.
        """
        box = self._mailbox
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
        box = self._mailbox
        try:
            if not (box.is_complete or self._is_closed):
                await box.wait(for_end=True)
        finally:
            self.close()
        if box.error is not None:
            raise box.error
        assert box.output is not None
        return box.output

    def close(self) -> None:
        """End the request before the next step, if it has not ended. No events follow."""
        if not self._is_closed:
            self._is_closed = True
            if not self._mailbox.is_complete:
                self._cancel(self._mailbox)

    def __del__(self) -> None:
        # The garbage collector may call this from any thread.
        self.close()


class EngineClient(ABC):
    """Requests to an engine that steps elsewhere: in another thread (`AsyncEngine`), or in another process.

    Args:
        tokenizer: A tokenizer of transformers; `None` if all prompts are tokens.
        max_sequence_length: Most tokens of a sequence, prompt included.
        max_requests: Most requests that run and wait at a time; `None` for any number.

    Attributes:
        tokenizer: The event loop may use it.
        failure: The error of the last step, if that step failed.
    """

    def __init__(self, tokenizer: Any | None, max_sequence_length: int, max_requests: int | None) -> None:
        if max_requests is not None and max_requests < 1:
            raise ValueError(f"max_requests={max_requests!r} is not possible: give an integer of at least 1, or None.")
        self.tokenizer, self.max_sequence_length, self.max_requests = tokenizer, max_sequence_length, max_requests
        self.failure: Exception | None = None
        # Other threads use the tokenizer while one thread tokenizes, and one tokenizer cannot always do both.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._counting = threading.Lock()
        self._accepted = 0  # requests that run or wait
        self._is_draining = False
        self._control_state = ControlState()

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return self._accepted

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    @property
    def is_paused(self) -> bool:
        """Whether `pause` or `sleep` has been called, so that new requests wait."""
        return self._control_state.is_paused

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has given its memory back."""
        return self._control_state.is_asleep

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether requests can run: not after `close`, and not after the GPU has failed."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return the load of the engine, and what it has counted. Any thread may ask, and waits for no step."""

    # --- requests -----------------------------------------------------------------------------------------------------

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a prompt, without stopping the event loop meanwhile.

        Args:
            prompt: As in `Engine.submit`.
            add_special_tokens: Whether a text gets the special tokens that the tokenizer adds.

        Raises:
            ValueError: It is no prompt, or a text and there is no tokenizer.
        """
        if not isinstance(prompt, str):
            return tokens_of_prompt(prompt, self._tokenizer, self.max_sequence_length)

        return await self._in_tokenizer_thread(
            lambda: tokens_of_text(
                prompt, self._tokenizer, self.max_sequence_length, add_special_tokens=add_special_tokens
            )
        )

    async def tokenize_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the tokens of a conversation.

        Args:
            messages: Dicts with "role" and "content".
            options: Of transformers' `apply_chat_template`.

        Raises:
            ValueError: The messages do not fit, or there is no tokenizer with a chat template.
        """
        return await self._in_tokenizer_thread(
            lambda: tokens_of_chats(messages, self._tokenizer, self.max_sequence_length, **options)[0]
        )

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, on_end: OnEnd | None = None
    ) -> RequestStream:
        """Begin a request; return once the engine has accepted it.

        Args:
            prompt: As in `Engine.submit`.
            params: How to continue it.
            on_end: Called once in this event loop when the accepted request has ended, also if the stream was closed
                before: with the output, or with `None` and the error of the step that lost the request.

        Raises:
            ValueError: The request does not fit the engine or the model.
            QueueFullError: There are `max_requests` requests.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The engine cannot run any more.
        """
        mailbox = Mailbox(on_end)
        self._accept()
        try:
            tokens = await self.tokenize(prompt)
        except BaseException:
            self._release(1)
            raise
        # From here on the request is counted until it ends, also if this task is cancelled.
        stream = RequestStream(mailbox, self._cancel)
        try:
            await self._submit(mailbox, tokens, params)
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
        """Refuse new requests, and wait for the end of those that run and wait. A pause ends, so that they can.

        Args:
            timeout: Most seconds to wait; then the rest is cancelled.

        Returns:
            Whether all have ended by themselves.
        """
        self._is_draining = True
        end = None if timeout is None else time.monotonic() + timeout
        if self._accepted and self.is_paused:
            # Without memory for them, or after the end of the engine, there is nothing to wait for.
            with suppress(ValueError, DrainingError, EngineFailedError, TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._control(Control("wake"))
        while self._accepted and not self.is_asleep and (end is None or time.monotonic() < end):
            await asyncio.sleep(0.01)
        has_ended = not self._accepted
        if not has_ended:
            await self._cancel_all()
        return has_ended

    @abstractmethod
    def close(self) -> None:
        """Cancel all requests, and end the engine. Blocks until a step in progress is done."""

    # --- pausing ------------------------------------------------------------------------------------------------------

    async def pause(self, mode: PauseMode = "abort", clear_cache: bool = True) -> None:
        """Let new requests wait until `resume`; return when the engine computes nothing any more.

        Args:
            mode: What happens to requests in progress: "abort" ends them with what they have, "wait" lets them finish,
                and "keep" lets them go on after the pause.
            clear_cache: Forget cached prefixes, unless `mode` is "keep".

        Raises:
            ValueError: `resume` was called before the engine was quiet; or the engine is asleep, and has kept requests
                that cannot finish.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The engine cannot run any more.
        """
        await self._pause_for(Control("pause", mode, clear_cache))

    async def _pause_for(self, control: Control) -> None:
        self._refuse_late_requests()
        self._control_state = dataclasses.replace(self._control_state, is_paused=True)
        await self._control(control)

    async def resume(self) -> None:
        """Let requests run again; does nothing without a pause.

        Raises:
            ValueError: The engine is asleep.
            EngineFailedError: The engine cannot run any more.
        """
        self._refuse_after_end()
        await self._control(Control("resume"))

    async def sleep(self, mode: PauseMode = "abort") -> None:
        """Pause, and give the engine's memory back until `wake`. Raises as `pause` does.

        Args:
            mode: As of `pause`. Requests that are kept are computed again after `wake`, as far as they were.
        """
        await self._pause_for(Control("sleep", mode))

    async def wake(self) -> None:
        """Take the memory again, and let requests run.

        Raises:
            ValueError: There is less memory than the engine needs; it is still asleep.
            EngineFailedError: The engine cannot run any more.
        """
        self._refuse_after_end()
        await self._control(Control("wake"))

    async def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Running requests keep their pages.

        Raises:
            EngineFailedError: The engine cannot run any more.
        """
        self._refuse_after_end()
        await self._control(Control("reset_prefix_cache"))

    async def update_weights(self, checkpoint: str) -> None:
        """Load the weights of a checkpoint, and copy them into the engine's model.

        No step is computed meanwhile. Requests in progress then go on with the new weights.

        Args:
            checkpoint: A folder, a GGUF file or a hub id, with a model of the same size.

        Raises:
            OSError: There is no such checkpoint.
            ValueError: It does not fit, and nothing has changed; or the engine was made without a function that loads
                weights.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The engine cannot run any more.
        """
        self._refuse_late_requests()
        await self._control(Control("update_weights", checkpoint=checkpoint))

    # --- how the engine is reached ------------------------------------------------------------------------------------

    @abstractmethod
    async def _submit(self, mailbox: Mailbox, tokens: list[int], params: SamplingParams | None) -> None:
        """Pass a request on, and wait until the engine has accepted it. Releases a request that is refused."""

    @abstractmethod
    def _cancel(self, mailbox: Mailbox) -> None:
        """End a request before the next step. Any thread may call this."""

    @abstractmethod
    async def _cancel_all(self) -> None:
        """End all requests before the next step."""

    @abstractmethod
    async def _control(self, control: Control) -> None:
        """Let the engine do something, wait until it has, and note the state afterwards."""

    # --- admission ----------------------------------------------------------------------------------------------------

    def check_admission(self) -> None:
        """Refuse what `stream` would refuse now, before a prompt is read and tokenized for it.

        Raises:
            QueueFullError: There are `max_requests` requests.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The engine cannot run any more.
        """
        self._refuse_late_requests()
        if self.max_requests is not None and self._accepted >= self.max_requests:
            raise QueueFullError(f"{self._accepted} requests run and wait, which is the limit: try again later.")

    def _accept(self) -> None:
        with self._counting:  # several event loops may come at once
            self.check_admission()
            self._accepted += 1

    def _release(self, count: int) -> None:
        with self._counting:
            self._accepted -= count

    def _refuse_late_requests(self) -> None:
        self._refuse_after_end()
        if self._is_draining:
            raise DrainingError(ENDING)

    def _refuse_after_end(self) -> None:
        if self.is_alive:
            return
        if self.failure is not None:
            raise EngineFailedError(f"the engine has ended: {self.failure}") from self.failure
        raise DrainingError(ENDING)

    async def _in_tokenizer_thread(self, function: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)


def step_failed(error: Exception) -> EngineFailedError:
    """Return what a request gets that was lost in a step."""
    failed = EngineFailedError(f"a step of the engine failed: {error}")
    failed.__cause__ = error
    return failed
