"""Comparison of the values of two tensors, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..layout.row_ranges import ConvertedTensor, RowRange
from ..sources.tensor_source import TensorSource
from ..sources.torch_tensors import as_tensor
from .comparison import ValueDifference

# Elements to compare at once. The block is small because its elements are compared as float64.
BLOCK = 2**19
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorPair:
    """Two tensors of one shape, and the sources to read them from."""

    a_source: TensorSource
    a: ConvertedTensor
    b_source: TensorSource
    b: ConvertedTensor

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The same rows of both tensors, in order: the index of the first element, and the two blocks, flat."""
        row_elements = math.prod(self.a.info.shape[1:])
        row = 0
        for a, b in _aligned(self.a.ranges, self.b.ranges, max(1, BLOCK // max(1, row_elements))):
            a_rows = as_tensor(self.a_source.read(a.name, a.start, a.stop), self.a.info.dtype)
            if self.a_source is self.b_source:
                a_rows = a_rows.clone()  # the next read may overwrite them
            b_rows = as_tensor(self.b_source.read(b.name, b.start, b.stop), self.b.info.dtype)
            yield row * row_elements, a_rows, b_rows
            row += a.stop - a.start


def _aligned(a: tuple[RowRange, ...], b: tuple[RowRange, ...], max_rows: int) -> Iterator[tuple[RowRange, RowRange]]:
    """Cut two lists of ranges with the same total of rows into pairs with the same number of rows."""
    a_left, b_left = ([each for each in ranges[::-1] if each.stop > each.start] for ranges in (a, b))
    while a_left:
        first, second = a_left.pop(), b_left.pop()
        rows = min(first.stop - first.start, second.stop - second.start, max_rows)
        for each, left in ((first, a_left), (second, b_left)):
            if each.start + rows < each.stop:
                left.append(RowRange(each.name, each.start + rows, each.stop))
        yield (
            RowRange(first.name, first.start, first.start + rows),
            RowRange(second.name, second.start, second.start + rows),
        )


def scan(pair: TensorPair, allowed: float | None, add_bytes: Callable[[int], None]) -> ValueDifference | None:
    """Find the elements that differ.

    Args:
        pair: The two tensors.
        allowed: Largest absolute difference that is allowed; `None` compares bits.
        add_bytes: Called with the bytes of a that each block compares.

    Returns:
        `None` if no element differs.
    """
    elements, largest = 0, -1.0
    worst: tuple[int, torch.Tensor, torch.Tensor] | None = None
    for first, a, b in pair.blocks():
        add_bytes(a.nbytes)
        if _same_bits(a, b):
            continue
        if allowed is None:
            where = (_bits(a) != _bits(b)).nonzero().view(-1)
            gaps = _gaps(_picked(a, where), _picked(b, where))
        else:
            gaps = _gaps(a, b)
            where = (gaps > allowed).nonzero().view(-1)
            gaps = gaps[where]
        if len(where) == 0:
            continue
        elements += len(where)
        place = int(gaps.argmax())
        if float(gaps[place]) > largest:
            largest = float(gaps[place])
            one = where[place : place + 1]
            worst = first + int(one), _picked(a, one), _picked(b, one)
    if worst is None:
        return None
    flat, a_value, b_value = worst
    return ValueDifference(
        elements=elements,
        of=math.prod(pair.a.info.shape),
        largest=largest,
        index=_index(flat, pair.a.info.shape),
        a=a_value.item(),
        b=b_value.item(),
        a_bits=_bits_text(a_value),
        b_bits=_bits_text(b_value),
        allowed=allowed,
    )


def scan_with_tolerance(pair: TensorPair, tolerance: float, add_bytes: Callable[[int], None]) -> ValueDifference | None:
    """Find the elements that differ by more than the tolerance times the largest finite magnitude of a.

    Args:
        pair: The two tensors.
        tolerance: Largest relative difference that is allowed.
        add_bytes: Called with the bytes of a that each block compares.

    Returns:
        `None` if no element differs by more.
    """
    scale = gap = 0.0
    for _, a, b in pair.blocks():
        add_bytes(a.nbytes)
        if a.numel() == 0:
            continue
        sizes = a.to(torch.float64).abs()
        scale = max(scale, float(torch.where(sizes.isfinite(), sizes, 0.0).max()))
        if not _same_bits(a, b):
            gap = max(gap, float(_gaps(a, b).max()))
    if gap <= tolerance * scale:
        return None
    # The scale is known only after the first pass. Few tensors need this second one.
    return scan(pair, tolerance * scale, lambda count: None)


def _gaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute differences; infinite between a NaN and a number, and 0 between NaNs and between equal infinities."""
    # float64 rounds the difference of two float32 or smaller numbers only where the error does not matter.
    a, b = a.to(torch.float64), b.to(torch.float64)
    gaps = (a - b).abs()
    gaps = torch.where(a.isnan() != b.isnan(), math.inf, gaps)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, gaps)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _picked(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return _bits(tensor)[where].view(tensor.dtype)  # torch cannot index every dtype


def _bits_text(value: torch.Tensor) -> str:
    size = value.dtype.itemsize
    return f"0x{int(_bits(value)) & (1 << 8 * size) - 1:0{2 * size}x}"


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return tuple(reversed(index))
