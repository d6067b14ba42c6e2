"""The tensors of a converted checkpoint as streams of bytes, so that no tensor is whole in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..layout.row_ranges import ConvertedTensor
from ..layout.tensor_info import TensorInfo
from ..sources.tensor_source import TensorSource, row_chunks


@dataclass(frozen=True)
class TensorStream:
    """A tensor to write.

    Attributes:
        name: Its name.
        info: Its dtype and shape.
        chunks: Starts an iteration over its bytes, in order. A chunk may be overwritten when the next one is asked for.
            The iteration raises `CheckpointError` if the bytes cannot be read.
    """

    name: str
    info: TensorInfo
    chunks: Callable[[], Iterator[memoryview]]


def stream(tensor: ConvertedTensor, source: TensorSource) -> TensorStream:
    """A converted tensor, read from the source while it is written."""
    return TensorStream(tensor.name, tensor.info, functools.partial(read_chunks, tensor, source))


def read_chunks(tensor: ConvertedTensor, source: TensorSource) -> Iterator[memoryview]:
    """Read the bytes of a converted tensor in its new dtype. A chunk may be overwritten when the next one is asked for.

    Raises:
        CheckpointError: A file cannot be read.
    """
    for rows in tensor.ranges:
        info = source.tensors[rows.name]
        for start, stop in row_chunks(info, rows.start, rows.stop):
            data = source.read(rows.name, start, stop)
            if info.dtype != tensor.info.dtype:
                from ..sources.torch_tensors import cast  # importing torch takes seconds, and only a cast needs it

                data = cast(data, info.dtype, tensor.info.dtype)
            yield data
