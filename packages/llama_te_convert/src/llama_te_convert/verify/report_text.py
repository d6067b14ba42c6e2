"""Text in reports: byte counts, and one name for the tensors of many layers, such as `layers.{0..3,5}.weight`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

NAME_IN_LAYER = re.compile(r"(?P<before>(?:model\.|transformer\.)?layers\.)(?P<layer>[0-9]{1,9})(?P<after>\..+)")

Key = TypeVar("Key", bound=Hashable)


def layer_of(name: str) -> int | None:
    """The layer of a tensor; `None` for a tensor outside the layers."""
    match = NAME_IN_LAYER.fullmatch(name)
    return None if match is None else int(match["layer"])


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ only in their layer into one name."""
    return [name for name, _ in fold((name, None) for name in names)]


def fold(pairs: Iterable[tuple[str, Key]]) -> list[tuple[str, Key]]:
    """Fold names that differ only in their layer and have the same key into one name."""
    layers: dict[tuple[str, str, Key], list[int]] = {}
    for name, key in pairs:
        match = NAME_IN_LAYER.fullmatch(name)
        # A name such as "layers.007" stays as it is, or its zeros would be lost.
        if match is None or str(int(match["layer"])) != match["layer"]:
            layers[name, "", key] = []
        else:
            layers.setdefault((match["before"], match["after"], key), []).append(int(match["layer"]))
    return [(before + _braced(found) + after, key) for (before, after, key), found in layers.items()]


def _braced(layers: Sequence[int]) -> str:
    return "" if not layers else str(layers[0]) if len(layers) == 1 else "{" + ranges_text(layers) + "}"


def ranges_text(layers: Iterable[int]) -> str:
    """Layers as ranges, such as "0..3,5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(range_text(first, last) for first, last in runs)


def range_text(first: int, last: int) -> str:
    """One range of layers, such as "0..3" or "5"."""
    return str(first) if first == last else f"{first}..{last}"


def bytes_text(count: int) -> str:
    """A number of bytes, such as "538.06 MB"."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"
