"""What counts as an integer in arguments: token ids, sizes and numbers of tokens."""

from __future__ import annotations

import operator


def as_integer(value: object) -> int | None:
    """Return an integer as an `int`.

    Args:
        value: An `int`, or an integer of NumPy or torch without dimensions.

    Returns:
        `None` for anything else: `True`, 1.0 and "1" are no integers.
    """
    dtype = getattr(value, "dtype", None)
    if isinstance(value, bool) or (dtype is not None and (getattr(value, "ndim", None) or "int" not in str(dtype))):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def checked_integer(name: str, value: object, least: int = 1) -> int:
    """Return an argument that is an integer of at least `least`.

    Raises:
        ValueError: It is something else.
    """
    integer = as_integer(value)
    if integer is None or integer < least:
        raise ValueError(f"{name}={value!r} is not possible: give an integer of at least {least}.")
    return integer
