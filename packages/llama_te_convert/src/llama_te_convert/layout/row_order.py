"""How the rows of Hugging Face tensors line up in one tensor of the Transformer Engine layout.

Shapes: K key/value heads, G query heads per key/value head, D head size, E hidden size, F MLP size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

# Importing torch takes seconds, and the order of rows is known without it.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadSizes:
    """The attention sizes of a model, which decide how query, key and value rows interleave.

    Attributes:
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; they divide the query heads.
        head_dim: Size of a head.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class PartRange(NamedTuple):
    """Rows [start, stop) of one part. The parts of a Transformer Engine tensor are its Hugging Face tensors."""

    part: int
    start: int
    stop: int


class RowOrder:
    """The order in which the rows of the parts follow each other in the Transformer Engine tensor."""

    def ranges(self, rows: int, sizes: HeadSizes) -> list[PartRange]:
        """The rows of the parts, in the order of the Transformer Engine tensor.

        Args:
            rows: Rows of the Transformer Engine tensor.
            sizes: Attention sizes of the model.

        Raises:
            ValueError: A tensor with `rows` rows cannot have this order.
        """
        raise NotImplementedError

    def merge(self, parts: Sequence[torch.Tensor], sizes: HeadSizes) -> torch.Tensor:
        """Make the Transformer Engine tensor from its parts.

        Raises:
            ValueError: A part has the wrong number of rows.
        """
        import torch

        ranges = self.ranges(sum(len(part) for part in parts), sizes)
        check_rows(ranges, [len(part) for part in parts])
        if len(ranges) == 1:
            return parts[0]
        return torch.cat([parts[part][start:stop] for part, start, stop in ranges])

    def split(self, tensor: torch.Tensor, sizes: HeadSizes) -> list[torch.Tensor]:
        """Take the Transformer Engine tensor apart: the reverse of `merge`."""
        import torch

        ranges = self.ranges(len(tensor), sizes)
        if len(ranges) == 1:
            return [tensor]
        pieces: list[list[torch.Tensor]] = [[] for _ in range(1 + max(each.part for each in ranges))]
        rows = tensor.split([stop - start for _, start, stop in ranges])
        for each, piece in zip(ranges, rows, strict=True):  # the ranges of one part come in its own order
            pieces[each.part].append(piece)
        return [torch.cat(piece) for piece in pieces]


def check_rows(ranges: Sequence[PartRange], rows: Sequence[int]) -> None:
    """Refuse parts that do not have the rows that `ranges` take.

    Args:
        ranges: The rows of the parts, in the order of the Transformer Engine tensor.
        rows: Rows of each part.

    Raises:
        ValueError: The message has both numbers of rows.
    """
    needed = [max((stop for part, _, stop in ranges if part == i), default=0) for i in range(len(rows))]
    if needed != list(rows):
        raise ValueError(f"they have {list(rows)} rows, but {needed} are needed")


class Unchanged(RowOrder):
    """One part, unchanged."""

    def ranges(self, rows: int, sizes: HeadSizes) -> list[PartRange]:
        """All rows of the only part."""
        return [PartRange(0, 0, rows)]


class InterleavedQKV(RowOrder):
    """Query, key and value rows, grouped by key/value head: its G query heads, then its key, then its value.

    [K·(G + 2)·D, E] from [K·G·D, E], [K·D, E] and [K·D, E].
    """

    def ranges(self, rows: int, sizes: HeadSizes) -> list[PartRange]:
        """Three ranges for each key/value head."""
        heads, groups, size = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        if rows != (heads + 2 * groups) * size:
            raise ValueError(
                f"{rows} rows of queries, keys and values do not fit {heads} heads and {groups} key/value heads of "
                f"size {size}"
            )
        group = heads // groups * size
        return [
            each
            for head in range(groups)
            for each in (
                PartRange(0, head * group, (head + 1) * group),
                PartRange(1, head * size, (head + 1) * size),
                PartRange(2, head * size, (head + 1) * size),
            )
        ]


class Stacked(RowOrder):
    """Parts of equal size, one after the other: [2·F, E] from two times [F, E]."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def ranges(self, rows: int, sizes: HeadSizes) -> list[PartRange]:
        """One range for each part."""
        if rows % self.parts:
            raise ValueError(f"{rows} rows cannot be cut into {self.parts} equal parts")
        return [PartRange(part, 0, rows // self.parts) for part in range(self.parts)]
