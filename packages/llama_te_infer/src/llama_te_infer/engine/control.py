"""Pausing an engine, its sleep and its weights: what a server asks for, and how the engine's loop follows.

Importing this module does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from .engine import Engine

PauseMode = Literal["abort", "wait", "keep"]


@dataclass(frozen=True)
class Control:
    """What a server asks of an engine, beside requests.

    Attributes:
        action: What is to be done. "sleep" pauses first, and "wake" resumes.
        mode: What happens to requests in progress before a pause or sleep: "abort" ends them, "wait" lets them finish,
            and "keep" lets them go on afterwards.
        clear_cache: Forget cached prefixes when the engine has paused, unless `mode` is "keep".
        checkpoint: A folder, GGUF file or hub id with new weights.
    """

    action: Literal["pause", "resume", "sleep", "wake", "reset_prefix_cache", "update_weights"]
    mode: PauseMode = "abort"
    clear_cache: bool = True
    checkpoint: str = ""


@dataclass(frozen=True)
class ControlState:
    """What has become of an engine.

    Attributes:
        is_paused: Whether requests wait.
        is_asleep: Whether the engine has given its memory back.
    """

    is_paused: bool = False
    is_asleep: bool = False


# Gets the state after what was asked for, and the error if that failed.
OnDone = Callable[[ControlState, Exception | None], None]
# Returns a model on the CPU with the weights of a checkpoint.
LoadWeights = Callable[[str], "nn.Module"]


class Controls:
    """Does what a server asks for, in the engine's thread.

    A pause holds all requests that come from then on. The engine is quiet once no earlier request is in progress, or at
    once if those are kept. Then the loop launches no steps, until the pause ends.

    Args:
        engine: The engine.
        running: The ids of all requests, which the loop keeps.
        load_weights: Loads checkpoints; `None` if there can be none.

    Attributes:
        is_frozen: Whether the loop launches no steps.
        is_waiting: Whether someone waits for the engine to be quiet.
    """

    def __init__(self, engine: Engine, running: set[int], load_weights: LoadWeights | None) -> None:
        self._engine, self._running, self._load_weights = engine, running, load_weights
        self._first_held: int | None = None  # while there is a pause: the id from which on requests wait for its end
        self._when_quiet: list[tuple[Callable[[], None], OnDone]] = []
        self.is_frozen = False

    @property
    def is_waiting(self) -> bool:
        """Whether someone waits for the engine to be quiet."""
        return bool(self._when_quiet)

    @property
    def _state(self) -> ControlState:
        return ControlState(self._first_held is not None, self._engine.is_asleep)

    def begin(self, control: Control, done: OnDone) -> None:
        """Do what a server asks for.

        Args:
            control: What it asks for.
            done: Called when it has been done, or has failed.
        """
        try:
            match control.action:
                case "pause":
                    self._pause(control.mode)
                    self._when_quiet.append((functools.partial(self._clear_cache, control), done))
                    return
                case "sleep":
                    self._pause(control.mode)
                    self._when_quiet.append((functools.partial(self._engine.sleep, keep_requests=True), done))
                    return
                case "resume":
                    if self._engine.is_asleep:
                        raise ValueError("the engine is asleep: wake it, and it resumes as well.")
                    self._resume()
                case "wake":
                    self._engine.wake()
                    self._resume()
                case "reset_prefix_cache":
                    self._engine.reset_prefix_cache()
                case "update_weights":
                    if self._load_weights is None:
                        raise ValueError("this engine was made without a function that loads weights.")
                    self._engine.update_weights(self._load_weights(control.checkpoint))
        except Exception as error:
            done(self._state, error)
        else:
            done(self._state, None)

    def follow(self) -> None:
        """Launch no further steps once all requests have ended that a pause waits for."""
        if self._when_quiet and not self._in_progress():
            self.is_frozen = True

    def tell(self) -> None:
        """Go on with what waits until the engine is quiet, if it is. The last step's results have been read."""
        if not self.is_frozen:
            return
        waiting, self._when_quiet = self._when_quiet, []
        for action, done in waiting:
            error = None
            try:
                action()
            except Exception as caught:
                error = caught
            done(self._state, error)

    def end(self, error: Exception) -> None:
        """Let those who wait get an error, since the loop ends."""
        waiting, self._when_quiet = self._when_quiet, []
        for _, done in waiting:
            done(self._state, error)

    def _pause(self, mode: PauseMode) -> None:
        if mode == "wait" and self._engine.is_asleep and self._in_progress():
            raise ValueError("the engine is asleep, so requests that it has kept cannot finish: wake it first.")
        self._first_held = self._engine.hold()
        if mode == "abort":
            for request_id in self._in_progress():
                self._engine.cancel(request_id)
        self.is_frozen = mode != "wait" or self._engine.is_asleep

    def _resume(self) -> None:
        self._engine.release()
        self._first_held, self.is_frozen = None, False
        self.end(ValueError("the engine has been resumed before it was quiet."))

    def _clear_cache(self, control: Control) -> None:
        if control.clear_cache and control.mode != "keep":
            self._engine.reset_prefix_cache()

    def _in_progress(self) -> list[int]:
        """Return the requests that came before the pause."""
        return [each for each in self._running if self._first_held is None or each < self._first_held]
