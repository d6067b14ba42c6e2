"""A check that one thread at a time uses an engine."""

from __future__ import annotations

import threading


class OneThread:
    """Remembers which thread uses an engine.

    A thread uses the engine from its first call until no request is in progress. Then any thread may.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0  # calls in progress, one inside the other

    def enter(self, has_requests: bool) -> bool:
        """Begin a call of the engine.

        Args:
            has_requests: Whether requests are in progress.

        Returns:
            Whether the call is not inside another one.

        Raises:
            RuntimeError: Another thread uses the engine.
        """
        caller = threading.current_thread()
        with self._lock:
            owner = self._owner
            if owner is not caller:
                if owner is not None and owner.is_alive() and (has_requests or self._depth):
                    raise RuntimeError(
                        f"thread {caller.name!r} has called an engine that thread {owner.name!r} uses: use an engine "
                        "from one thread, and hand requests to that thread, for example with a queue.Queue. Another "
                        "thread may use the engine when no request is in progress."
                    )
                self._owner, self._depth = caller, 0
            self._depth += 1
            return self._depth == 1

    def leave(self) -> None:
        """End a call of the engine."""
        with self._lock:
            self._depth -= 1
