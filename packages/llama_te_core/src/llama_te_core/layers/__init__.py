"""The decoder layer in two implementations, its input, and the key/value cache's interface.

`backend` says what both implementations can do, `te` and `reference` are the two, and `selection` chooses one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .selection import is_transformer_engine, transformer_engine_problem

__all__ = ["is_transformer_engine", "transformer_engine_problem"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before they are asked for, since they take torch with them
        return getattr(importlib.import_module(f"{__name__}.selection"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
