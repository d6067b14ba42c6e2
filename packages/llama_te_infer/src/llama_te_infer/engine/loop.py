"""The loop around an engine: one thread steps it, and other threads pass it what to do before the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from ..sampling_params import SamplingParams
from .client import ENDING, DrainingError, step_failed
from .control import Control, Controls, ControlState, LoadWeights, OnDone
from .engine import Engine
from .outputs import News, TokenEvent

if TYPE_CHECKING:
    import torch


class EngineLoop:
    """Steps an engine in the thread that calls `run`.

    Args:
        engine: The engine. Nobody else may use it meanwhile.
        deliver: Gets the news after each step, in the engine's thread.
        load_weights: See `Controls`.

    Attributes:
        engine: The engine.
        failure: The error of the last step, if that step failed. After an error of a CUDA device the loop has ended.
        has_ended: Whether no step follows.
    """

    def __init__(
        self, engine: Engine, deliver: Callable[[News], None], load_weights: LoadWeights | None = None
    ) -> None:
        self.engine, self._deliver = engine, deliver
        self.failure: Exception | None = None
        self.has_ended = self.is_closing = False
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._compiling = ThreadPoolExecutor(2, "grammars")  # so that one large grammar does not delay all others
        # The engine's thread alone uses these.
        self._running: set[int] = set()
        self._news = News()
        self._controls = Controls(engine, self._running, load_weights)

    # --- for any thread -----------------------------------------------------------------------------------------------

    def command(self, command: Callable[[], None]) -> None:
        """Let the engine's thread call a function before its next step. After the end it is called at once."""
        with self._wake:
            if not self.has_ended:
                self._commands.append(command)
                self._wake.notify()
                return
        command()  # it finds no requests

    def prepare(self, params: SamplingParams | None) -> Future[None]:
        """Compile the grammar of a request, which may take seconds, so that `submit` need not.

        The future has no exception: `submit` raises that.
        """
        form = params.structured_outputs if isinstance(params, SamplingParams) else None

        def compile_form() -> None:
            if form is not None:
                with suppress(Exception):
                    self.engine.grammars.compile(form)

        with self._wake:
            if form is not None and not self.is_closing:
                return self._compiling.submit(compile_form)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        """Cancel all requests, and end the loop after the step in progress."""
        with self._wake:
            self.is_closing = True
            self._wake.notify()
        self._compiling.shutdown(wait=False)

    # --- for commands -------------------------------------------------------------------------------------------------

    def submit(self, tokens: list[int], params: SamplingParams | None, arrival: float) -> int:
        """Put a request in the engine's queue, and return its id. Takes and raises what `Engine.submit` does."""
        request_id = self.engine.submit(tokens, params, self._note, arrival)
        self._running.add(request_id)
        return request_id

    def cancel(self, request_id: int | None) -> None:
        """End a request; nothing happens if there is none of this id."""
        if request_id in self._running:
            self.engine.cancel(request_id)

    def control(self, control: Control, done: OnDone) -> None:
        """Pause the engine and the like; see `Controls.begin`."""
        if self.has_ended or self.is_closing:
            done(ControlState(), DrainingError(ENDING))
        else:
            self._controls.begin(control, done)

    def cancel_all(self) -> None:
        """End all requests."""
        for request_id in list(self._running):
            self.engine.cancel(request_id)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step the engine until `close` is called, or its GPU has failed."""
        if self.engine.model.device.type == "cuda":
            import torch

            torch.cuda.set_device(self.engine.model.device)
        while not self.has_ended:
            with self._wake:
                while not (self._commands or self.is_closing or self._has_work):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                is_closing = self.is_closing  # once: who sets it later is heard in the next round
            for command in commands:
                command()
            if is_closing:
                self.cancel_all()
            self._controls.follow()
            if self.engine.has_unfinished:
                self._step()
                news, self._news = self._news, News()
                self._deliver(news)
            self._controls.tell()
            if is_closing or (self.failure is not None and has_lost_device(self.engine.model.device)):
                with self._wake:
                    self.has_ended = True
                    commands = self._commands
                self._controls.end(DrainingError(ENDING) if self.failure is None else step_failed(self.failure))
                for command in commands:
                    command()

    @property
    def _has_work(self) -> bool:
        """Whether there is something to do without further commands."""
        return self._controls.is_waiting or (self.engine.has_unfinished and not self._controls.is_frozen)

    def _note(self, event: TokenEvent) -> None:
        self._news.events.append(event)

    def _step(self) -> None:
        news = self._news
        try:
            news.outputs = self.engine.settle() if self._controls.is_frozen else self.engine.step()
        except Exception as error:  # the engine has dropped all requests
            self.failure = error
            news.lost = list(self._running)
        else:
            self.failure = None
        news.failure = self.failure
        self._running.difference_update(news.lost, (output.request_id for output in news.outputs))


def has_lost_device(device: torch.device) -> bool:
    """Return whether a device is a GPU that computes nothing any more, as after an illegal memory access."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
