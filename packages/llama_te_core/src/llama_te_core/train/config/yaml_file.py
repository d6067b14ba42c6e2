"""Reads the YAML files of configurations within limits, and refuses what YAML has beyond plain values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ...files.input_files import read_bytes

MAX_BYTES = 2**20
MAX_DEPTH = 16  # of lists and mappings in each other; a configuration has 4


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the content of a YAML file that has values, lists and mappings alone.

    An alias can stand for a large part of the file, so aliases in aliases take more memory than there is. Of a key that
    a mapping has twice, YAML's readers silently take one.

    Args:
        path: The file.

    Raises:
        ValueError: The file cannot be read, is too large or too deep, is no YAML, or has an anchor, an alias, a tag or
            a key twice.
        ImportError: PyYAML is not installed.
    """
    import yaml

    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8: {error}.") from error
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)  # noqa: S506 - both are safe loaders
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is refused: {' '.join(str(error).split())[:300]}.") from error


def _check(events: Iterator[Any]) -> None:
    import yaml

    levels: list[_Mapping | None] = []  # the open mappings, and None for each open list
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            levels.pop()
        if isinstance(event, yaml.NodeEvent):
            place = f"line {event.start_mark.line + 1} has"
            if event.anchor is not None:
                raise ValueError(f"{place} an anchor or an alias, write the value itself in each place")
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"{place} the tag {event.tag[:80]!r}, write a plain value")
            if levels and levels[-1] is not None:
                levels[-1].take(place, event.value if isinstance(event, yaml.ScalarEvent) else None)
        if isinstance(event, yaml.CollectionStartEvent):
            levels.append(_Mapping() if isinstance(event, yaml.MappingStartEvent) else None)
            if len(levels) > MAX_DEPTH:
                raise ValueError(f"{place} more than {MAX_DEPTH} levels of lists and mappings")


class _Mapping:
    """A mapping whose keys and values come in turns."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._expects_key = True

    def take(self, place: str, scalar: str | None) -> None:
        """Take the next key or value; refuse a key that came before."""
        if self._expects_key and scalar is not None:
            if scalar in self._keys:
                raise ValueError(f"{place} the key {scalar[:80]!r} a second time, remove one")
            self._keys.add(scalar)
        self._expects_key = not self._expects_key
