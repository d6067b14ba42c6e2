"""SIGTERM and Ctrl-C as requests that all processes answer together, between two steps."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.mesh import process_rank

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Within this context, SIGTERM and Ctrl-C stop no process; `agreed` reports them to all after the same step.

    Processes get signals at different moments. One that ended alone would make the others wait for ever. A Ctrl-C that
    follows another signal ends its process at once, by a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self._noted = 0
        self._before: dict[signal.Signals, Any] = {}
        # On the host, where reading the answer waits for no GPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            # A script's shell starts background jobs with Ctrl-C ignored, since it is meant for others.
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._answer()

    def agreed(self) -> str | None:
        """Return which signal any process had, "SIGTERM" or "Ctrl-C"; all processes call this after each step.

        With several processes this answers the call before, whose answer arrived during the step.
        """
        number = self._noted
        if self._group is not None:
            number = self._answer()
            noted = torch.tensor(self._noted)
            work = dist.all_reduce(noted, dist.ReduceOp.MAX, self._group, async_op=True)
            assert work is not None
            self._asked = work, noted
        return {0: None, signal.SIGINT: "Ctrl-C"}.get(number, "SIGTERM")

    def _answer(self) -> int:
        asked, self._asked = self._asked, None
        if asked is None:
            return 0
        work, noted = asked
        work.wait()
        return int(noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted:
            raise KeyboardInterrupt
        if number == signal.SIGINT and process_rank() == 0:
            print("Ctrl-C: the run ends after this step. A second one ends it at once.", file=sys.stderr, flush=True)
        self._noted = number
