"""Values of the command's options: sizes, assignments and the precision of layers."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from .errors import CheckpointError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_PRECISIONS = {"fp8": "fp8", "fp4": "fp4", "none": None}


def size(text: str) -> int:
    """Parse a number of bytes, such as "5GB" or "2GiB".

    Raises:
        argparse.ArgumentTypeError: The text is not a size of at least one byte.
    """
    number = text.upper().rstrip("KMGTIB")
    unit = text.upper()[len(number) :]
    try:
        size = int(float(number) * (_UNITS[unit] if unit else 1))
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write one as in 5GB, 500MB or 2GiB")
    return size


def assignment(text: str) -> tuple[str, Any]:
    """Parse FIELD=VALUE. The value is JSON; a value that is not JSON is a string.

    Raises:
        argparse.ArgumentTypeError: The text has no "=", or another name than an identifier before it.
    """
    field, equals, value = text.partition("=")
    if not equals or not field.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def layer_precision(spec: str, layers: int) -> list[str | None]:
    """Parse the precision of each layer from ranges of layers as in Python, such as "1:-1=fp8".

    Args:
        spec: The ranges, separated by commas. A later one overrides an earlier one.
        layers: Number of layers.

    Returns:
        The precision of each layer; `None` for layers in no range.

    Raises:
        CheckpointError: The text is not valid, or names a layer that does not exist.
    """
    precision: list[str | None] = [None] * layers

    def refuse(entry: str, why: str) -> NoReturn:
        raise CheckpointError(
            f"--layer-precision {spec!r}: {entry!r} {why}. Write layers as 0, -1 or 1:-1, then = and one of "
            f"{', '.join(_PRECISIONS)}; separate several with commas."
        )

    for entry in spec.split(","):
        where, equals, what = entry.strip().partition("=")
        if not equals or what.strip().lower() not in _PRECISIONS:
            refuse(entry, "does not end in =fp8, =fp4 or =none")
        try:
            bounds = [int(bound) if bound.strip() else None for bound in where.split(":")]
        except ValueError:
            refuse(entry, "does not name layers by whole numbers")
        if len(bounds) == 1 and bounds[0] is not None:
            if not -layers <= bounds[0] < layers:
                refuse(entry, f"names a layer that the model does not have: it has {layers}")
            chosen = [range(layers)[bounds[0]]]
        elif len(bounds) in (2, 3) and bounds[2:] != [0]:
            chosen = list(range(layers)[slice(*bounds)])
        else:
            refuse(entry, "does not name layers")
        for layer in chosen:
            precision[layer] = _PRECISIONS[what.strip().lower()]
    return precision
