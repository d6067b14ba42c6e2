"""SIGTERM as a wish that all processes agree on, between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


class Interruption:
    """While it is entered, SIGTERM stops no process: `agreed` tells of it, to all after the same step.

    Signals come to the processes at different moments, and one that left the others would make them wait for ever.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None
        # On the host, where looking at the answer waits for no GPU.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if kind is None:
            self._answer()

    def agreed(self) -> bool:
        """Whether any process had a signal; all processes call this after each step.

        With several processes, the answer is the one to the call before: it has come while the step was computed.
        """
        if self._group is None:
            return self._noted
        answer = self._answer()
        noted = torch.tensor(int(self._noted))
        work = dist.all_reduce(noted, dist.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._asked = work, noted
        return answer

    def _answer(self) -> bool:
        asked, self._asked = self._asked, None
        if asked is None:
            return False
        work, noted = asked
        work.wait()
        return bool(noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
