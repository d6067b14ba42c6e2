"""The events of some requests, as an iterator that cancels them when it is dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .outputs import TokenEvent


class TokenStream(Iterator[TokenEvent]):
    """Yields events, and lets the engine compute steps while there are none.

    The requests run from the beginning. They end when the stream is closed or dropped, even before its first event.

    Args:
        events: The requests' callbacks add to it.
        advance: Computes a step; returns `False` if no request is in progress.
        close: Cancels the requests, and drops their outputs.
        abandon: Marks them to be cancelled by the engine's next call. Any thread may call it, at any time.
    """

    def __init__(
        self,
        events: deque[TokenEvent],
        advance: Callable[[], bool],
        close: Callable[[], None],
        abandon: Callable[[], None],
    ) -> None:
        self._events, self._advance, self._close, self._abandon = events, advance, close, abandon
        self._is_closed = False

    def __next__(self) -> TokenEvent:
        """Return the next event."""
        try:
            while not self._events:
                if self._is_closed or not self._advance():
                    raise StopIteration
        except BaseException:
            self.close()
            raise
        return self._events.popleft()

    def close(self) -> None:
        """Cancel the requests."""
        if not self._is_closed:
            self._is_closed = True
            self._close()
        self._events.clear()

    def __del__(self) -> None:
        # The garbage collector may call this in the middle of a step, and from any thread.
        if not self._is_closed:
            self._abandon()
