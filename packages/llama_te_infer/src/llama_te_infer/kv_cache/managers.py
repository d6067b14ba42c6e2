"""Where the keys and values of a cache live: in rows of memory, or in pages.

Shapes: B rows of the batch, T new tokens, L keys per row, K key/value heads, D size of a head, P pages per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..ops import library
from ..ops.reorder import reorder_pages, reorder_rows, takes_reorder
from .page_pool import PagePool


class CacheManager(Protocol):
    """Where keys and values live."""

    cache: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors of a layer."""
        ...

    def reset(self) -> None:
        """Forget all sequences."""
        ...

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Give rows room for `lengths` tokens; row i goes on with the first `starts[i]` tokens of row `sources[i]`."""
        ...

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Where tokens go in the flattened memory of a layer, from their rows and places there."""
        ...

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [B, L, K, D] with L ≥ `keys`."""
        ...

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Row i becomes what row `source_rows[i]` was, for all layers; it had and has `lengths[i]` tokens."""
        ...


def _allocate(
    shape: tuple[int, ...], head_dim_v: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # Zeros, not empty: attention multiplies what stands behind a row's tokens by 0, which keeps a NaN one.
    return (
        torch.zeros(shape, dtype=dtype, device=device),
        torch.zeros((*shape[:-1], head_dim_v), dtype=dtype, device=device),
    )


class NonPagedKVCacheManager:
    """One row of `max_seqlen` tokens per sequence."""

    def __init__(
        self,
        max_batch_size: int,
        max_seqlen: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        head_dim_v: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        self.num_heads, self.head_dim_k = num_heads, head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.device = device if device is not None else default_device()
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors [max_batch_size, max_seqlen, K, D] of a layer."""
        shape = (self.max_batch_size, self.max_seqlen, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = _allocate(shape, self.head_dim_v, self.dtype, self.device)

    def reset(self) -> None:
        """Forget all sequences: a row is overwritten from its start."""

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Move the rows that go on elsewhere to their new place."""
        moved = [
            (row, source, start)
            for row, (source, start) in enumerate(zip(sources, starts, strict=True))
            if source not in (None, row) and start > 0
        ]
        if moved:
            to, source, kept = zip(*moved, strict=True)
            to_R, source_R = torch.tensor(to, device=self.device), torch.tensor(source, device=self.device)
            for tensor in _tensors(self.cache):
                tensor[to_R, : max(kept)] = tensor[source_R, : max(kept)]

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Row times its size plus place."""
        return row_T * self.max_seqlen + place_T

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A view of the first `keys` tokens of each row."""
        key_BLKD, value_BLKD = self.cache[layer_number]
        return key_BLKD[:batch_size, :keys], value_BLKD[:batch_size, :keys]

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Copy rows, as far as they are filled; with the compiled operator in place, without a second copy."""
        rows, keys = len(lengths), max(lengths)
        caches = _tensors(self.cache)
        if caches and library.available(self.device.type) and takes_reorder(caches, rows):
            reorder_rows(caches, source_rows, torch.tensor(lengths, dtype=torch.int32).to(self.device))
            return
        for tensor in caches:
            tensor[:rows, :keys] = tensor[:rows, :keys].index_select(0, source_rows)


class PagedKVCacheManager:
    """Rows are lists of pages of `page_size` tokens each, taken from a common pool when they are needed.

    The pool may be smaller than all rows at their longest. Rows that begin alike share pages, and get a copy of their
    own of one that they write to.

    Which row holds which page is known twice: here as lists, and as a tensor for the kernels. With the compiled
    operator a reorder of beams changes the tensor alone, on the device, and nothing waits for it; the lists catch up
    when rows need their next pages.
    """

    def __init__(
        self,
        total_num_pages: int,
        page_size: int,
        num_heads: int,
        head_dim_k: int,
        dtype: torch.dtype,
        max_batch_size: int,
        max_seqlen: int,
        head_dim_v: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.total_num_pages, self.page_size = total_num_pages, page_size
        self.num_heads, self.head_dim_k = num_heads, head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.dtype = dtype
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        self.max_pages_per_seq = max_seqlen // page_size
        self.device = device if device is not None else default_device()
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Entries behind a row's pages name any page.
        self.page_table = torch.zeros(max_batch_size, self.max_pages_per_seq, dtype=torch.int32, device=self.device)
        self._ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Return all pages to the pool."""
        self.pool = PagePool(self.total_num_pages, self.page_size)
        self._pages: list[list[int]] = []
        self._pending: list[tuple[torch.Tensor, list[int]]] = []  # reorders that the lists have not seen
        self._lengths: list[int] = []
        self._own_last_pages = True  # whether no row shares a page that is not full

    @property
    def pages(self) -> list[list[int]]:
        """The pages of each row. After a reorder on the device, looking waits for it."""
        self._catch_up()
        return self._pages

    @property
    def used_pages(self) -> int:
        """Pages that hold something. After a reorder on the device, looking waits for it."""
        self._catch_up()
        return self.pool.used

    def allocate_memory(self, layer_number: int) -> None:
        """Make the tensors [total_num_pages, page_size, K, D] of a layer."""
        shape = (self.total_num_pages, self.page_size, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = _allocate(shape, self.head_dim_v, self.dtype, self.device)

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Take the pages that rows need, return those that no row needs any more, copy those to be written apart.

        Raises:
            ValueError: The pool has too few pages left; nothing has changed then.
        """
        if self._have_room(sources, starts, lengths):
            self._lengths = list(lengths)
            return
        self._catch_up()
        assignment = self.pool.assign(self._pages, sources, starts, lengths)
        self._write_table(assignment.rows)
        if assignment.copies:
            from_P, to_P = torch.tensor(assignment.copies, device=self.device).unbind(1)
            for tensor in _tensors(self.cache):
                tensor[to_P] = tensor[from_P]
        self._pages, self._lengths = assignment.rows, list(lengths)
        self._own_last_pages = all(
            length % self.page_size == 0 or self.pool.holders[row[-1]] == 1
            for row, length in zip(self._pages, lengths, strict=True)
        )

    def slots(self, row_T: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """Page times its size plus place in the page."""
        page_T = self.page_table[row_T, place_T // self.page_size].long()
        return page_T * self.page_size + place_T % self.page_size

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the pages of each row, one behind the other."""
        table_BP = self.page_table[:batch_size, : -(-keys // self.page_size)].long()
        key_BLKD, value_BLKD = (tensor[table_BP].flatten(1, 2) for tensor in self.cache[layer_number])
        return key_BLKD, value_BLKD

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Let rows hold the pages of others.

        The compiled operator does it on the device and copies what the last pages hold, if these are not full. Where it
        does not apply, rows share these pages too, until they write to them.
        """
        caches = _tensors(self.cache)
        compiled = caches and library.available(self.device.type) and takes_reorder(caches, len(lengths))
        if not (compiled and self._own_last_pages and list(lengths) == self._lengths):
            # Which rows these are has to be known here: a wait for the device.
            self.assign_rows(source_rows.tolist(), lengths, lengths)
            return
        length_B = torch.tensor(lengths, dtype=torch.int32).to(self.device)
        reorder_pages(caches, self.page_table, source_rows, length_B, self.page_size, self._ticket)
        self._pending.append((source_rows.to(torch.int64, copy=True), list(lengths)))

    def _have_room(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether all rows stay, whole, and go on within their last pages, which are theirs alone."""
        stay = list(sources) == list(range(len(self._pages))) and list(starts) == self._lengths
        if not (stay and self._own_last_pages):
            return False
        size = self.page_size
        return all(
            -(-length // size) == len(row) and (start == length or start // size == len(row) - 1)
            for row, start, length in zip(self._pages, starts, lengths, strict=True)
        )

    def _catch_up(self) -> None:
        """Do to the lists what the operator did to the table; one wait for the device, however many reorders."""
        if not self._pending:
            return
        rows = self._pages
        sources_BR = torch.stack([sources for sources, _ in self._pending]).tolist()
        for sources, (_, lengths) in zip(sources_BR, self._pending, strict=True):
            rows = [
                row
                if row is rows[source]
                else rows[source][: length // self.page_size] + row[length // self.page_size :]
                for row, source, length in zip(rows, sources, lengths, strict=True)
            ]
        self._pending = []
        self.pool.replace(self._pages, rows)
        self._pages = rows

    def _write_table(self, rows: list[list[int]]) -> None:
        """Bring the device's table up to date, where it is not."""
        places, entries = [], []
        for i, row in enumerate(rows):
            before = self._pages[i] if i < len(self._pages) else []
            if row is before:
                continue
            for j, page in enumerate(row):
                if j >= len(before) or page != before[j]:
                    places.append(i * self.max_pages_per_seq + j)
                    entries.append(page)
        if places:
            place_N, entry_N = torch.tensor([places, entries]).to(self.device)
            self.page_table.view(-1)[place_N] = entry_N.int()


def default_device() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _tensors(cache: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [tensor for tensors in cache.values() for tensor in tensors]
