"""An engine for asyncio: one thread steps it, and tasks of any event loop pass their requests to that thread.

    async with AsyncEngine(engine) as requests:
        async for events in await requests.stream("The sky is blue because"):
            print("".join(event.text for event in events), end="")

After each step the thread hands all new tokens of an event loop over in one call, so the number of calls does not grow
with the number of requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..sampling_params import SamplingParams
from .client import EndFor, EngineClient, EventFor, Mailbox, hand_over, sort_news
from .control import Control, ControlState, LoadWeights
from .engine import Engine
from .loop import EngineLoop
from .outputs import News
from .statistics import EngineStats

_Answer = Callable[[Exception | None], None]


class AsyncEngine(EngineClient):
    """Runs an engine in a thread of its own.

    Tasks of several event loops in several threads may use it. Nobody else may use the engine meanwhile.

    Args:
        engine: The engine.
        max_requests: Most requests that run and wait at a time; `None` for any number.
        load_weights: Returns a model on the CPU for the checkpoint of `update_weights`, which is refused without it.

    Attributes:
        engine: The engine.
        failure: The error of the last step, if that step failed. After an error of a CUDA device the thread has ended,
            and no request can run.
    """

    def __init__(
        self, engine: Engine, *, max_requests: int | None = None, load_weights: LoadWeights | None = None
    ) -> None:
        super().__init__(engine.tokenizer, engine.max_sequence_length, max_requests)
        self.engine = engine
        self._loop = EngineLoop(engine, self._deliver, load_weights)
        self._mailboxes: dict[int, Mailbox] = {}  # the engine's thread alone uses it
        self._thread = threading.Thread(target=self._loop.run, name="engine", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> AsyncEngine:
        """Return the engine itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel all requests, and end the thread."""
        await asyncio.to_thread(self.close)

    @property
    def is_alive(self) -> bool:
        """Whether requests can run: not after `close`, and not after the GPU has failed."""
        return not self._loop.has_ended

    def stats(self) -> EngineStats:
        """Return the load of the engine, and what it has counted. Any thread may ask, and waits for no step."""
        return self.engine.stats()

    def close(self) -> None:
        """Cancel all requests, and end the thread. Blocks until a step in progress is done."""
        self._is_draining = True
        self._loop.close()
        self._thread.join()
        self._tokenizing.shutdown()

    # --- from an event loop to the thread -----------------------------------------------------------------------------

    async def _submit(self, mailbox: Mailbox, tokens: list[int], params: SamplingParams | None) -> None:
        def submit() -> None:
            try:
                if self._loop.has_ended or self._loop.is_closing:
                    self._refuse_late_requests()
                mailbox.request_id = self._loop.submit(tokens, params, mailbox.arrival)
            except BaseException:
                self._release(1)
                raise
            self._mailboxes[mailbox.request_id] = mailbox

        try:
            await asyncio.wrap_future(self._loop.prepare(params))
        except BaseException:
            self._release(1)
            raise
        await self._call(submit)

    def _cancel(self, mailbox: Mailbox) -> None:
        self._loop.command(lambda: self._loop.cancel(mailbox.request_id))

    async def _cancel_all(self) -> None:
        await self._call(self._loop.cancel_all)

    async def _control(self, control: Control) -> None:
        def begin(answer: _Answer) -> None:
            def done(state: ControlState, error: Exception | None) -> None:
                self._control_state = state
                answer(error)

            self._loop.control(control, done)

        await self._ask(begin)

    async def _call(self, function: Callable[[], None]) -> None:
        """Run a function in the engine's thread before its next step."""

        def begin(answer: _Answer) -> None:
            error = None
            try:
                function()
            except Exception as caught:
                error = caught
            answer(error)

        await self._ask(begin)

    async def _ask(self, begin: Callable[[_Answer], None]) -> None:
        """Call a function in the engine's thread before its next step, and wait for the answer, which may be an error.

        Args:
            begin: Gets a function that takes the answer, now or later, in the engine's thread.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if answer.done():
                return  # the caller has been cancelled
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

        self._loop.command(lambda: begin(lambda error: _tell(loop, settle, error)))
        await answer

    # --- from the thread to the event loops ---------------------------------------------------------------------------

    def _deliver(self, news: News) -> None:
        """Hand the news over, with one call for each event loop."""
        self.failure = news.failure
        events, ends = sort_news(news, self._mailboxes)
        self._release(len(ends))
        by_loop: defaultdict[asyncio.AbstractEventLoop, tuple[list[EventFor], list[EndFor]]]
        by_loop = defaultdict(lambda: ([], []))
        for event in events:
            by_loop[event[0].loop][0].append(event)
        for end in ends:
            by_loop[end[0].loop][1].append(end)
        for loop, parts in by_loop.items():
            _tell(loop, hand_over, *parts)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Let an event loop call a function, unless the loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
