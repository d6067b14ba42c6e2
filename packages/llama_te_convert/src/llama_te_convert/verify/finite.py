"""Weights that are NaN or infinite, found without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..layout.tensor_info import TensorInfo
from ..sources.tensor_source import TensorSource, row_chunks
from .report_text import fold


class _Format(NamedTuple):
    """The bits of a floating-point dtype.

    Attributes:
        integer: The unsigned integer of the same size.
        magnitude: Mask of all bits but the sign.
        infinity: The magnitude of an infinity. Larger ones are NaNs.
    """

    integer: type[np.unsignedinteger]
    magnitude: int
    infinity: int


_FORMATS = {
    "float64": _Format(np.uint64, 2**63 - 1, 0x7FF << 52),
    "float32": _Format(np.uint32, 2**31 - 1, 0xFF << 23),
    "float16": _Format(np.uint16, 2**15 - 1, 0x1F << 10),
    "bfloat16": _Format(np.uint16, 2**15 - 1, 0xFF << 7),
    "float8_e5m2": _Format(np.uint8, 2**7 - 1, 0x1F << 2),
    "float8_e4m3fn": _Format(np.uint8, 2**7 - 1, 0x7E),  # no infinity: 0x7E is its largest number
}


class NotFinite(NamedTuple):
    """The values of a tensor that are not finite.

    Attributes:
        nans: Number of NaNs.
        infinities: Number of infinities.
    """

    nans: int
    infinities: int

    def __str__(self) -> str:
        """As in "3 NaN and 1 infinite"."""
        parts = [f"{self.nans} NaN" if self.nans else "", f"{self.infinities} infinite" if self.infinities else ""]
        return " and ".join(part for part in parts if part)


def values_that_are_not_finite(source: TensorSource, progress: Callable[[int], None] | None = None) -> list[str]:
    """Read all floating-point tensors, and describe those with NaNs or infinities.

    Args:
        source: The tensors of a checkpoint.
        progress: Called with the bytes of each part that is read.

    Returns:
        One sentence for each group of tensors that differ only in their layer.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = []
    for name, info in source.tensors.items():
        counts = _count(source, name, info, progress)
        if any(counts):
            found.append((name, (counts, info.shape)))
    return [f"{name} {list(shape)} has {counts} values." for name, (counts, shape) in fold(found)]


def _count(source: TensorSource, name: str, info: TensorInfo, progress: Callable[[int], None] | None) -> NotFinite:
    form = _FORMATS.get(info.dtype)
    nans = infinities = 0
    for start, stop in row_chunks(info, 0, info.rows) if form is not None and info.nbytes else ():
        assert form is not None
        data = source.read(name, start, stop)
        magnitudes = np.frombuffer(data, form.integer) & form.integer(form.magnitude)
        if magnitudes.max() >= form.infinity:
            nans += int((magnitudes > form.infinity).sum())
            if info.dtype != "float8_e4m3fn":
                infinities += int((magnitudes == form.infinity).sum())
        if progress is not None:
            progress(len(data))
    return NotFinite(nans, infinities)
