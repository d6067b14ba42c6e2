"""The pages of each row of a batch whose rows are continued, copied and reordered. No tensors, no device.

A row is a list of page numbers. Rows with a common prefix share its pages. Before a row writes to a page that other
rows hold too, the row gets a copy of that page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .page_pool import PagePool


class RowPages:
    """Lists of pages, one for each row, and the pool that the pages come from.

    Args:
        total_num_pages: Pages of the pool.
        page_size: Tokens of a page.

    Attributes:
        rows: The pages of each row. A row that does not change keeps its list object.
        pool: The pool.
    """

    def __init__(self, total_num_pages: int, page_size: int) -> None:
        self.pool = PagePool(total_num_pages, page_size)
        self.rows: list[list[int]] = []

    def assign(
        self, sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Replace all rows by rows that continue them. Each new row may then be written from its start to its length.

        Args:
            sources: The row that each new row continues; `None` for an empty row. Several new rows may continue one
                row. A row that no new row continues returns its pages.
            starts: Tokens that each new row keeps of its source.
            lengths: Tokens that each new row needs room for, at least as many as it keeps.

        Returns:
            Pairs of pages: the content of the first has to be copied to the second before anything is written. No page
            is the second of two pairs, or the first of one pair and the second of another.

        Raises:
            ValueError: The pool has too few free pages; nothing has changed then.
        """
        pool, size = self.pool, self.pool.page_size
        kept = [
            [] if source is None else self._kept(self.rows[source], start)
            for source, start in zip(sources, starts, strict=True)
        ]
        change = _difference(self.rows, kept)
        copied = []
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if length > start and start % size:
                page = kept[i][-1]
                if pool.holders[page] + change[page] > 1:
                    change[page] -= 1
                    copied.append(i)
        missing = len(copied) + sum(
            pool.pages_for(length) - len(row) for row, length in zip(kept, lengths, strict=True)
        )
        released = [page for page, count in change.items() if count < 0 and pool.holders[page] + count == 0]
        if missing > len(pool.free) + len(released):
            raise ValueError(
                f"the cache's {pool.total_num_pages} pages of {size} tokens are not enough: {missing} more "
                f"are needed for rows of {list(lengths)} tokens, and {len(pool.free) + len(released)} are free. Make "
                "total_num_pages larger, or end some of the sequences first."
            )
        self._apply(change)
        copies = []
        for i in copied:
            page = kept[i][-1]
            kept[i] = [*kept[i][:-1], *pool.take(1)]
            copies.append((page, kept[i][-1]))
        for i, length in enumerate(lengths):
            more = pool.pages_for(length) - len(kept[i])
            if more > 0:
                kept[i] = kept[i] + pool.take(more)
        self.rows = kept
        return copies

    def replace(self, rows: list[list[int]]) -> None:
        """Record that the rows hold other pages now. Each of these pages had a holder before."""
        self._apply(_difference(self.rows, rows))
        self.rows = rows

    def _kept(self, row: list[int], start: int) -> list[int]:
        count = self.pool.pages_for(start)
        return row if count == len(row) else row[:count]

    def _apply(self, change: Counter[int]) -> None:
        self.pool.share((+change).elements())  # first, so that no page is free in between
        self.pool.release((-change).elements())


def _difference(rows: list[list[int]], others: list[list[int]]) -> Counter[int]:
    """Return by how much the number of holders of each page changes. Unchanged rows cost nothing."""
    change: Counter[int] = Counter()
    for i in range(max(len(rows), len(others))):
        before = rows[i] if i < len(rows) else []
        after = others[i] if i < len(others) else []
        if after is not before:
            change.subtract(before)
            change.update(after)
    return change
