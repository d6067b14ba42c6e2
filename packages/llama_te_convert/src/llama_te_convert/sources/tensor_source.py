"""Where the tensors of a checkpoint come from, a few rows at a time, whatever its format."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..configs.core_format import checkpoint_format

# Rows are handed on in parts of at most this size, so that memory does not grow with a checkpoint's tensors, and that
# what was just read is still in the processor's cache when it is written.
PART_BYTES = 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or written, and why. What commands report in one line."""


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype, by its name in torch as in "bfloat16", and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        bits = re.search(r"\d+", self.dtype)  # the first number in a name, which bool has none of
        return 1 if bits is None else max(1, int(bits[0]) // 8)

    @property
    def is_floating_point(self) -> bool:
        """Whether elements are floating-point numbers."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def rows(self) -> int:
        """Size of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes


class TensorSource(Protocol):
    """The tensors of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of each tensor, by name, in the checkpoint's order."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads may read at the same time."""
        ...

    def read(self, name: str, start: int, stop: int) -> memoryview:
        """The bytes of rows [start, stop) of a tensor; a thread's next call may overwrite them.

        Raises:
            CheckpointError: The file cannot be read.
        """
        ...

    def close(self) -> None:
        """Close files."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open for reading.

    Attributes:
        path: Where it is, for messages.
        config: What its `config.json` says (or what makes up for it).
        source: Its tensors.
    """

    path: str
    config: dict[str, Any]
    source: TensorSource

    @property
    def is_te(self) -> bool:
        """Whether it has the Transformer Engine layout."""
        return self.config.get("model_type") == checkpoint_format.MODEL_TYPE


def read_exactly(file: int, view: memoryview, offset: int, path: Path, name: str) -> None:
    """Fill `view` with the bytes of an open file from `offset` on.

    Args:
        file: Its descriptor.
        view: What to fill.
        offset: Where the bytes are.
        path: The file, for messages.
        name: The tensor that they are of, likewise.

    Raises:
        CheckpointError: The file cannot be read, or ends before.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        if count == 0:
            raise CheckpointError(f"{path} ends within {name}: the file is not complete.")
        done += count


def parts(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) into ranges of at most `PART_BYTES`, or of one row."""
    rows = max(1, PART_BYTES // max(1, info.row_bytes))
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)
