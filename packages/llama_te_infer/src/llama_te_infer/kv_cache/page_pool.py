"""The pages of a paged cache, with a count of the holders of each page. No tensors, no device."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """A fixed number of reference-counted pages.

    Several rows may hold one page: beams of one prompt, or requests with a common prefix.

    Args:
        total_num_pages: Number of pages.
        page_size: Tokens of a page.

    Attributes:
        holders: Number of holders of each page.
        free: Pages without a holder; `take` removes them from the end.
    """

    def __init__(self, total_num_pages: int, page_size: int) -> None:
        self.total_num_pages, self.page_size = total_num_pages, page_size
        self.holders = [0] * total_num_pages
        self.free = list(range(total_num_pages))[::-1]

    @property
    def used(self) -> int:
        """Number of pages with a holder."""
        return self.total_num_pages - len(self.free)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages a row of `tokens` tokens has."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """Take free pages; each has one holder then.

        Raises:
            ValueError: The pool has fewer free pages; nothing has changed then.
        """
        if count > len(self.free):
            raise ValueError(
                f"{count} pages are asked for, and {len(self.free)} of {self.total_num_pages} are free: make "
                "total_num_pages larger, or end some of the sequences first."
            )
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add a holder to each page. The pages must have one already."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free"
            self.holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove a holder from each page. A page without holders is free."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free already"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free.append(page)
