"""The progress of a command on standard error."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class _Bar(Protocol):
    total: float | None
    n: float

    def refresh(self) -> object: ...
    def close(self) -> object: ...


class Progress:
    """Shows a bar on a terminal, and otherwise prints a line every ten seconds.

    Args:
        title: Text before the numbers.
        after: Seconds without a bar at the beginning.
    """

    def __init__(self, title: str, after: float = 0) -> None:
        self.title = title
        self._bar_from = time.monotonic() + after
        self._bar: _Bar | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, total: int) -> None:
        """Show the bytes that are done and the bytes in total."""
        now = time.monotonic()
        if not sys.stderr.isatty():
            if now - self._last >= 10:
                self._last = now
                print(f"{self.title}: {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)
            return
        if now < self._bar_from:
            return
        if self._bar is None:
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.title, file=sys.stderr)
        if now - self._last >= 0.1 or done == total:
            self._last = now
            self._bar.n = done
            self._bar.refresh()
