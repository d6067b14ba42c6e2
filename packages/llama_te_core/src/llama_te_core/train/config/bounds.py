"""Checks of single numbers of the configuration."""

from __future__ import annotations

import math
from typing import Any

MOST = 2**63 - 1  # torch knows no larger integer


def at_least(name: str, value: Any, least: int, most: int = MOST) -> None:
    """Refuse a value that is no integer of at least `least` and at most `most`.

    Raises:
        ValueError: With the option's name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: it must be an integer of at least {least}.")
    if value > most:
        given = value if value.bit_length() < 1000 else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{name}={given}: it must be at most {most}.")


def finite(name: str, value: float) -> None:
    """Refuse a value that is no finite number of at least 0.

    Raises:
        ValueError: With the option's name and the value.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r}: it must be a finite number of at least 0.")
