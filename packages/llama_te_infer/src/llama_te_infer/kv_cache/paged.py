"""Paged storage: rows are lists of pages of `page_size` tokens each.

Shapes: R rows, B rows of the batch, T new tokens, L keys per row, K key/value heads, D size of a head, P pages per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops import library
from ..ops.append_rope import takes_heads
from ..ops.reorder import reorder_pages, takes_reorder
from ..ops.widen_pages import widen_pages
from .cache_format import CacheFormat, LayerMemory, as_bytes
from .page_pool import PagePool
from .row_pages import RowPages
from .storage import default_device, tensors_of


class PagedStorage:
    """Pages of memory, and the table of each row's pages. The caller decides which row holds which page.

    Args:
        scratch_pages: With FP8 pages, how many of them are in memory in `dtype` at a time, for attention of prompts.
            0 for pages of `dtype`.

    Attributes:
        page_table: int32 [R, P]. Entries behind a row's pages name any page.
        format: Of the pages.
        scratch: Keys and values [scratch_pages + 1, page_size, K, D] of `dtype`, which all layers use one after the
            other. The last page stays zeros. `None` where attention reads the pages as they are.
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
        scratch_pages: int = 0,
    ) -> None:
        self.total_num_pages, self.page_size = total_num_pages, page_size
        self.num_heads, self.head_dim_k = num_heads, head_dim_k
        self.head_dim_v = head_dim_k if head_dim_v is None else head_dim_v
        self.format = CacheFormat(dtype, is_fp8=scratch_pages > 0)
        self.max_batch_size, self.max_seqlen = max_batch_size, max_seqlen
        self.max_pages_per_seq = max_seqlen // page_size
        self.device = device if device is not None else default_device()
        self.cache: dict[int, LayerMemory] = {}
        self.scratch: LayerMemory | None = None
        if scratch_pages:
            shape = (scratch_pages + 1, page_size, num_heads, head_dim_k)
            self.scratch = CacheFormat(dtype).allocate(shape, self.head_dim_v, self.device)
        self.page_table = torch.zeros(max_batch_size, self.max_pages_per_seq, dtype=torch.int32, device=self.device)
        self._ticket = torch.zeros(1, dtype=torch.int32, device=self.device)

    def allocate_memory(self, layer_number: int) -> None:
        """Allocate the tensors [total_num_pages, page_size, K, D] of a layer."""
        shape = (self.total_num_pages, self.page_size, self.num_heads, self.head_dim_k)
        self.cache[layer_number] = self.format.allocate(shape, self.head_dim_v, self.device)

    def slots(self, row_T: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        """Return the slot of each token: page times page size plus position in the page."""
        page_T = self.page_table[row_T, position_T // self.page_size].long()
        return page_T * self.page_size + position_T % self.page_size

    def rows(self, layer_number: int, batch_size: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a copy of each row's pages, one behind the other."""
        table_BP = self.page_table[:batch_size, : -(-keys // self.page_size)]
        if self.scratch is None:
            key_BPSKD, value_BPSKD = self.format.read(self.cache[layer_number], table_BP.long())
        else:
            # Whole rows: a place that attention multiplies by 0 must not have another row's NaN.
            whole_B = table_BP.new_full((batch_size,), table_BP.shape[1] * self.page_size)
            self.widen(layer_number, table_BP, whole_B)
            key_BPSKD, value_BPSKD = (pages[: table_BP.numel()].unflatten(0, table_BP.shape) for pages in self.scratch)
        return key_BPSKD.flatten(1, 2), value_BPSKD.flatten(1, 2)

    def widen(self, layer_number: int, page_table_BP: torch.Tensor, length_B: torch.Tensor) -> None:
        """Write the FP8 pages of rows to `scratch`: page p of row b becomes page b * P + p.

        Args:
            layer_number: The layer.
            page_table_BP: int32; `scratch` has at least B * P pages.
            length_B: int32, tokens of each row. Pages behind them may stay as they are.
        """
        assert self.scratch is not None
        if self._takes_widen_pages():
            keys, values, key_scale, value_scale = self.cache[layer_number]
            for pages, scale, target in zip((keys, values), (key_scale, value_scale), self.scratch, strict=True):
                widen_pages(pages, scale, page_table_BP, length_B, target)
            return
        key_BPSKD, value_BPSKD = self.format.read(self.cache[layer_number], page_table_BP.long())
        for scratch, pages_BPSKD in zip(self.scratch, (key_BPSKD, value_BPSKD), strict=True):
            scratch[: page_table_BP.numel()] = pages_BPSKD.flatten(0, 1)

    def _takes_widen_pages(self) -> bool:
        heads = {self.head_dim_k, self.head_dim_v}
        return (
            self.format.has_operators
            and library.available(self.device.type)
            and all(takes_heads(self.format.dtype, size) for size in heads)
        )

    def copy_pages(self, from_P: torch.Tensor, to_P: torch.Tensor) -> None:
        """Copy the content of pages, in all layers. No page is both read and written, or written twice."""
        for tensor in map(as_bytes, tensors_of(self.cache)):
            tensor[to_P] = tensor[from_P]

    def takes_reorder(self, rows: int) -> bool:
        """Return whether `reorder_pages` can reorder this many rows here."""
        caches = tensors_of(self.cache)
        return bool(caches) and library.available(self.device.type) and takes_reorder(caches, rows)

    def reorder_pages(self, page_table_BP: torch.Tensor, source_B: torch.Tensor, length_B: torch.Tensor) -> None:
        """Let rows continue other rows, on the device: share the full pages, copy the last page if it is not full.

        Args:
            page_table_BP: int32, changed in place.
            source_B: int64, the row that each row continues.
            length_B: int32, tokens of each row, and of its source.
        """
        caches = tensors_of(self.cache)
        reorder_pages(caches, page_table_BP, source_B, length_B, self.page_size, self._ticket)


class PagedKVCacheManager(PagedStorage):
    """Paged storage that takes pages from a common pool when rows need them.

    The pool may be smaller than all rows at their longest. Rows with a common prefix share its pages. A row that writes
    to a shared page gets a copy of it first.

    The rows' pages are recorded twice: here as lists, and as a tensor for the kernels. The compiled operator reorders
    beams on the device: it changes the tensor alone, and the host does not wait. The lists follow when rows need their
    next pages.

    Args: see `PagedStorage`.
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
        super().__init__(
            total_num_pages, page_size, num_heads, head_dim_k, dtype, max_batch_size, max_seqlen, head_dim_v, device
        )
        self.reset()

    def reset(self) -> None:
        """Return all pages to the pool."""
        self._row_pages = RowPages(self.total_num_pages, self.page_size)
        self._pending: list[tuple[torch.Tensor, list[int]]] = []  # reorders that the lists do not include yet
        self._lengths: list[int] = []
        self._own_last_pages = True  # no row shares a partly filled page

    @property
    def pool(self) -> PagePool:
        """The pool that the pages come from."""
        return self._row_pages.pool

    @property
    def pages(self) -> list[list[int]]:
        """The pages of each row. After a reorder on the device, reading this waits for the device."""
        self._apply_pending()
        return self._row_pages.rows

    @property
    def used_pages(self) -> int:
        """Number of pages that rows hold. After a reorder on the device, reading this waits for the device."""
        self._apply_pending()
        return self.pool.used

    def assign_rows(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Take the pages that rows need, return the pages of rows that end, copy shared pages before a write.

        Raises:
            ValueError: The pool has too few pages left; nothing has changed then.
        """
        if self._have_room(sources, starts, lengths):
            self._lengths = list(lengths)
            return
        self._apply_pending()
        before = self._row_pages.rows
        copies = self._row_pages.assign(sources, starts, lengths)
        rows = self._row_pages.rows
        self._write_table(before, rows)
        if copies:
            from_P, to_P = torch.tensor(copies, device=self.device).unbind(1)
            self.copy_pages(from_P, to_P)
        self._lengths = list(lengths)
        self._own_last_pages = all(
            length % self.page_size == 0 or self.pool.holders[row[-1]] == 1
            for row, length in zip(rows, lengths, strict=True)
        )

    def reorder(self, source_rows: torch.Tensor, lengths: Sequence[int]) -> None:
        """Let rows continue other rows.

        The compiled operator does it on the device, and copies the last pages that are not full. Without it, rows share
        these pages until they write to them.
        """
        in_order = self._own_last_pages and list(lengths) == self._lengths
        if not (in_order and self.takes_reorder(len(lengths))):
            # The host has to know the rows here, so it waits for the device.
            self.assign_rows(source_rows.tolist(), lengths, lengths)
            return
        self.reorder_pages(self.page_table, source_rows, torch.tensor(lengths, dtype=torch.int32).to(self.device))
        self._pending.append((source_rows.to(torch.int64, copy=True), list(lengths)))

    def _have_room(self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Return whether every row continues itself and stays within its last page, which no other row shares."""
        rows = self._row_pages.rows
        stay = list(sources) == list(range(len(rows))) and list(starts) == self._lengths
        if not (stay and self._own_last_pages):
            return False
        size = self.page_size
        return all(
            -(-length // size) == len(row) and (start == length or start // size == len(row) - 1)
            for row, start, length in zip(rows, starts, lengths, strict=True)
        )

    def _apply_pending(self) -> None:
        """Apply the table's reorders to the lists. Waits for the device once for any number of reorders."""
        if not self._pending:
            return
        rows = self._row_pages.rows
        sources_BR = torch.stack([sources for sources, _ in self._pending]).tolist()
        for sources, (_, lengths) in zip(sources_BR, self._pending, strict=True):
            rows = [
                row
                if row is rows[source]
                else rows[source][: length // self.page_size] + row[length // self.page_size :]
                for row, source, length in zip(rows, sources, lengths, strict=True)
            ]
        self._pending = []
        self._row_pages.replace(rows)

    def _write_table(self, before: list[list[int]], after: list[list[int]]) -> None:
        """Write the entries of the device's table that differ."""
        entries, pages = [], []
        for i, row in enumerate(after):
            old = before[i] if i < len(before) else []
            if row is old:
                continue
            for j, page in enumerate(row):
                if j >= len(old) or page != old[j]:
                    entries.append(i * self.max_pages_per_seq + j)
                    pages.append(page)
        if entries:
            entry_N, page_N = torch.tensor([entries, pages]).to(self.device)
            self.page_table.view(-1)[entry_N] = page_N.int()
