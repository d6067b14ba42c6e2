"""An extension that another version of the package built is named in one line."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest

from llama_te_infer.ops import library


@pytest.fixture(autouse=True)
def fresh_limits() -> Iterator[None]:
    library.limits.cache_clear()
    yield
    library.limits.cache_clear()


def limits_without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in library.extension().limits().items() if name not in names}


OLDER = {
    "no function": {},
    "a limit fewer": {"limits": lambda: limits_without("max_linear_products")},
    "a limit more": {"limits": lambda: {**limits_without(), "max_linear_products_of_old": 3}},
}


@pytest.mark.parametrize("members", OLDER.values(), ids=OLDER)
def test_an_extension_of_another_version(members: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.limits().vector_bytes == 16
    library.limits.cache_clear()
    other = types.SimpleNamespace(__file__="/old/_extension.so", **members)
    monkeypatch.setattr(library, "extension", lambda: other)
    with pytest.raises(
        RuntimeError,
        match="another version of llama-te-infer built the compiled extension /old/_extension.so .*max_linear_products"
        ".*: reinstall llama-te-infer",
    ):
        library.limits()
