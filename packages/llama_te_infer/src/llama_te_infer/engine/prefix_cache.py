"""Which pages hold which beginnings of texts, so that a prompt that begins like an earlier one is not computed again.

Keys and values of a page depend on all tokens before it, so a page is known by the chain of pages that leads to it: by
its own tokens and the entry of the page before. Both are compared as they are, not by a hash alone. No tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from itertools import count

from ..kv_cache.page_pool import PagePool

_Key = tuple[int, tuple[int, ...]]  # the number of the entry before, and the page's tokens
_BEGINNING = -1


@dataclass(frozen=True)
class _Entry:
    page: int
    number: int  # never used again, unlike the page: what followed an entry that is gone is not found any more


class PrefixCache:
    """Hands out the pages of a pool, and remembers what full ones hold after the sequences that filled them ended.

    The cache is itself a holder of the pages that it remembers. Those that nobody else holds are idle: they are given
    up, least recently used first and the end of a text before its beginning, when the pool has no other pages left.

    Args:
        pool: The pages. Whoever takes pages of this pool does so here.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._entries: dict[_Key, _Entry] = {}
        self._keys: dict[int, _Key] = {}  # of each remembered page
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._numbers = count()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self.pool.free) + len(self._idle)

    @property
    def remembered(self) -> KeysView[int]:
        """The pages whose content is known."""
        return self._keys.keys()

    def take(self, count: int) -> list[int]:
        """Pages for one holder each, with nothing in them that anyone needs.

        Raises:
            ValueError: Fewer are available; nothing has changed then.
        """
        if count <= self.available:
            for _ in range(count - len(self.pool.free)):
                page, _nothing = self._idle.popitem(last=False)
                del self._entries[self._keys.pop(page)]
                self.pool.release([page])
        return self.pool.take(count)

    def share(self, pages: Sequence[int]) -> None:
        """Let each of the pages have one holder more."""
        self.pool.share(pages)
        for page in pages:
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Let each of a sequence's pages, in the order of its tokens, have one holder less."""
        self.pool.release(pages)
        for page in reversed(pages):
            if page in self._keys and self.pool.holders[page] == 1:
                self._idle[page] = None

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest remembered beginning of a text. To be shared before anything else is taken."""
        pages = []
        number = _BEGINNING
        for content in self._contents(tokens):
            entry = self._entries.get((number, content))
            if entry is None:
                break
            pages.append(entry.page)
            number = entry.number
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Take note of what a sequence's full pages hold. Where other pages are known to hold the same, they stay.

        Args:
            tokens: The sequence's tokens, as far as keys and values are written.
            pages: Its pages; more than these tokens fill are not looked at.
        """
        number = _BEGINNING
        for content, page in zip(self._contents(tokens), pages, strict=False):
            key = (number, content)
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(page, next(self._numbers))
                if page in self._keys:  # remembered behind an entry that is gone
                    del self._entries[self._keys[page]]
                else:
                    self.pool.share([page])
                self._entries[key] = entry
                self._keys[page] = key
            number = entry.number

    def _contents(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each full page."""
        size = self.pool.page_size
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]
