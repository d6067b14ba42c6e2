"""Names of torchdata that its documentation does not promise. Checked against torchdata 0.11."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def shut_down_workers(iterator: Any) -> None:
    """End the workers of an iterator of a `StatefulDataLoader`, and wait for them."""
    iterator._shutdown_workers()


def batches_since_snapshot(state: Mapping[str, Any]) -> int:
    """Return how many batches older than the loader itself a part of a `StatefulDataLoader`'s state is."""
    return int(state.get("_steps_since_snapshot") or 0)
