"""An extension that another version of the package built is named in one line."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llama_te_infer.ops import library


@pytest.fixture(autouse=True)
def fresh_limits() -> Iterator[None]:
    library.limits.cache_clear()
    yield
    library.limits.cache_clear()


OLDER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no limits": lambda limits: {},
    "a limit fewer": lambda limits: {"limits": lambda: {k: v for k, v in limits.items() if k != "max_linear_products"}},
    "a limit more": lambda limits: {"limits": lambda: limits | {"old_max_linear_products": 3}},
}


@pytest.mark.parametrize("members", OLDER.values(), ids=OLDER)
def test_an_extension_of_another_version(
    members: Callable[[dict[str, Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = library.extension().limits()
    assert library.limits().vector_bytes == 16
    library.limits.cache_clear()
    other = types.SimpleNamespace(__file__="/old/_extension.so", **members(limits))
    monkeypatch.setattr(library, "extension", lambda: other)
    with pytest.raises(
        RuntimeError,
        match="another version of llama-te-infer built the compiled extension /old/_extension.so .*max_linear_products"
        ".*: reinstall llama-te-infer",
    ):
        library.limits()
