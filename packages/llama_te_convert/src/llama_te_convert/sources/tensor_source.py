"""The interface of all readers: the tensors of a checkpoint, a few rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from ..layout.tensor_info import TensorInfo

# Rows are read in chunks of at most this size. Memory then does not grow with the tensors of a checkpoint, and a chunk
# is still in the processor's cache when it is written.
CHUNK_BYTES = 2**20


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
        """Read the bytes of rows [start, stop) of a tensor. The next read in the same thread may overwrite them.

        Raises:
            CheckpointError: The file cannot be read.
        """
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def read_exactly(file: int, view: memoryview, offset: int, path: Path, name: str) -> None:
    """Fill `view` with the bytes of an open file that begin at `offset`.

    Args:
        file: Descriptor of the file.
        view: The memory to fill.
        offset: Position of the first byte in the file.
        path: The file, for messages.
        name: The tensor that the bytes belong to, for messages.

    Raises:
        CheckpointError: The file cannot be read, or is too short.
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


def row_chunks(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows [start, stop) of a tensor into ranges of at most `CHUNK_BYTES`, or of one row.

    Rows without bytes, of which a file may claim any number, are one range.
    """
    rows = max(1, CHUNK_BYTES // info.row_bytes if info.row_bytes else stop - start)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)
