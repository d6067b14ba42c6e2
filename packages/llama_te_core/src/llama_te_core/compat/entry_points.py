"""Functions of other packages of this project, which register themselves when they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def installed_function(group: str, name: str) -> Callable[..., Any] | None:
    """Return the function that a package has registered under a name; `None` if there is none."""
    for entry in entry_points(group=group):
        if entry.name == name:
            function: Callable[..., Any] = entry.load()
            return function
    return None
