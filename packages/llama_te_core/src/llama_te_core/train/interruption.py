"""SIGTERM as a request that all processes answer together, between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist


class Interruption:
    """Within this context, SIGTERM stops no process, and `agreed` reports it to all after the same step.

    Processes get signals at different moments. One that ended alone would make the others wait for ever.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None
        # On the host, where reading the answer waits for no GPU.
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
        """Tell whether any process had a signal; all processes call this after each step.

        With several processes this answers the call before, whose answer arrived during the step.
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
