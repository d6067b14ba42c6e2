"""Which pages of a paged cache are free, and how many rows hold each of the others. No tensors, no device.

Rows are lists of page ids. Several rows may hold a page: beams of one prompt, or requests that begin alike. A page that
a row is going to write to and others hold too is replaced by a copy first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """What `PagePool.assign` decided.

    Attributes:
        rows: The pages of each row.
        copies: Pairs of a page and the page that what it holds has to be copied to, before anything is written. No
            page is in two pairs' second place, or in one pair's first and another's second.
    """

    rows: list[list[int]]
    copies: list[tuple[int, int]]


class PagePool:
    """A fixed number of pages that rows take, share and give back.

    Args:
        total_num_pages: Pages there are.
        page_size: Tokens of a page.
    """

    def __init__(self, total_num_pages: int, page_size: int) -> None:
        self.total_num_pages, self.page_size = total_num_pages, page_size
        self.holders = [0] * total_num_pages  # rows that hold each page
        self.free = list(range(total_num_pages))[::-1]  # taken from the end

    @property
    def used(self) -> int:
        """Pages that some row holds."""
        return self.total_num_pages - len(self.free)

    def pages_for(self, tokens: int) -> int:
        """Pages that a row of so many tokens has."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Free pages, which then have one holder each.

        Raises:
            ValueError: Fewer are free; nothing has changed then.
        """
        if count > len(self.free):
            raise ValueError(
                f"{count} pages are asked for, and {len(self.free)} of {self.total_num_pages} are free: make "
                "total_num_pages larger, or end some of the sequences first."
            )
        return [self._take() for _ in range(count)]

    def share(self, pages: Sequence[int]) -> None:
        """Let each of the pages, which are held already, have one holder more."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free"
            self.holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let each of the pages have one holder less; those without any are free again."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free already"
            self._change(Counter({page: -1}))

    def assign(
        self, rows: list[list[int]], sources: Sequence[int | None], starts: Sequence[int], lengths: Sequence[int]
    ) -> Assignment:
        """Replace rows by others that go on from them, each ready to be written from its start to its length.

        Args:
            rows: The pages of each row as they are.
            sources: For each new row, the row whose pages it goes on with; `None` for none. Rows may be repeated, and
                left out, which gives their pages back.
            starts: Tokens that each new row keeps of its source.
            lengths: Tokens that each new row is to have, at least as many.

        Raises:
            ValueError: The pool has too few free pages; nothing has changed then.
        """
        kept = [
            [] if source is None else self._kept(rows[source], start)
            for source, start in zip(sources, starts, strict=True)
        ]
        change = _difference(rows, kept)
        copied = []
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if length > start and start % self.page_size:
                page = kept[i][-1]
                if self.holders[page] + change[page] > 1:
                    change[page] -= 1
                    copied.append(i)
        missing = len(copied) + sum(
            self.pages_for(length) - len(row) for row, length in zip(kept, lengths, strict=True)
        )
        released = [page for page, count in change.items() if count < 0 and self.holders[page] + count == 0]
        if missing > len(self.free) + len(released):
            raise ValueError(
                f"the cache's {self.total_num_pages} pages of {self.page_size} tokens are not enough: {missing} more "
                f"are needed for rows of {list(lengths)} tokens, and {len(self.free) + len(released)} are free. Make "
                "total_num_pages larger, or end some of the sequences first."
            )
        self._change(change)
        copies = []
        for i in copied:
            page = kept[i][-1]
            kept[i] = [*kept[i][:-1], self._take()]
            copies.append((page, kept[i][-1]))
        for i, length in enumerate(lengths):
            more = self.pages_for(length) - len(kept[i])
            if more > 0:
                kept[i] = kept[i] + [self._take() for _ in range(more)]
        return Assignment(kept, copies)

    def replace(self, rows: list[list[int]], others: list[list[int]]) -> None:
        """Take note that rows now hold other pages, all of which some row held before."""
        self._change(_difference(rows, others))

    def _kept(self, row: list[int], start: int) -> list[int]:
        count = self.pages_for(start)
        return row if count == len(row) else row[:count]

    def _take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def _change(self, change: Counter[int]) -> None:
        for page, count in change.items():
            if count == 0:
                continue
            self.holders[page] += count
            if self.holders[page] == 0:
                self.free.append(page)


def _difference(rows: list[list[int]], others: list[list[int]]) -> Counter[int]:
    """By how much the number of holders of each page changes; rows that stay as they are cost nothing."""
    change: Counter[int] = Counter()
    for i in range(max(len(rows), len(others))):
        before = rows[i] if i < len(rows) else []
        after = others[i] if i < len(others) else []
        if after is not before:
            change.subtract(before)
            change.update(after)
    return change
