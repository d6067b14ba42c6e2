"""Index of cached prompt prefixes, so that a prompt with the prefix of an earlier text reuses its pages. No tensors.

Keys and values of a page depend on all tokens before it. So the index knows a page by the chain of pages that leads to
it: by the page's tokens and the entry of the page before. It compares both as they are, not by a hash alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from itertools import count

from ..kv_cache.page_pool import PagePool

_Key = tuple[int, tuple[int, ...]]  # the number of the entry before, and the page's tokens
_ROOT = -1


@dataclass(frozen=True)
class _Entry:
    page: int
    number: int  # never reused, unlike the page: entries behind a removed one are not found any more


class PrefixCache:
    """Gives out the pages of a pool, and remembers the content of full pages after their sequences have ended.

    The cache is itself a holder of the pages that it remembers. A page without another holder is idle. When the pool
    has no free pages left, the cache gives up idle ones: the least recently used text first, its end before its
    beginning.

    Args:
        pool: The pages. All pages of the pool are taken through this cache.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._entries: dict[_Key, _Entry] = {}
        self._keys: dict[int, _Key] = {}  # of each remembered page
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._numbers = count()

    @property
    def available(self) -> int:
        """Number of pages that `take` can give."""
        return len(self.pool.free) + len(self._idle)

    @property
    def remembered(self) -> KeysView[int]:
        """The pages whose content is known."""
        return self._keys.keys()

    def take(self, count: int) -> list[int]:
        """Take pages for one holder each. No other holder needs their content.

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
        """Add a holder to each of the pages."""
        self.pool.share(pages)
        for page in pages:
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Remove a holder from each of a sequence's pages, given in the order of its tokens."""
        self.pool.release(pages)
        for page in reversed(pages):
            if page in self._keys and self.pool.holders[page] == 1:
                self._idle[page] = None

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Return the pages of a text's longest remembered prefix. The caller shares them before it takes others."""
        pages = []
        number = _ROOT
        for content in self._contents(tokens):
            entry = self._entries.get((number, content))
            if entry is None:
                break
            pages.append(entry.page)
            number = entry.number
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Record the content of a sequence's full pages. A page known for the same content keeps its entry.

        Args:
            tokens: The sequence's tokens with keys and values in the cache.
            pages: Its pages; pages that these tokens do not fill are ignored.
        """
        number = _ROOT
        for content, page in zip(self._contents(tokens), pages, strict=False):
            key = (number, content)
            entry = self._entries.get(key)
            if entry is None:
                entry = _Entry(page, next(self._numbers))
                if page in self._keys:  # remembered behind an entry that was removed
                    del self._entries[self._keys[page]]
                else:
                    self.pool.share([page])
                self._entries[key] = entry
                self._keys[page] = key
            number = entry.number

    def clear(self) -> None:
        """Forget all content. Pages without another holder become free."""
        pages = list(self._keys)
        self._entries.clear()
        self._keys.clear()
        self._idle.clear()
        self.pool.release(pages)

    def _contents(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the tokens of each full page."""
        size = self.pool.page_size
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]
