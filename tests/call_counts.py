"""How often methods are called while a test runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


class Calls(SimpleNamespace):
    """A number for each method that is watched, by the name given to it."""

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, name: str) -> None:
        """Count calls of `owner.method` as `name` from now on, until the test ends."""
        original = getattr(owner, method)
        setattr(self, name, 0)

        def counting(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counting)
