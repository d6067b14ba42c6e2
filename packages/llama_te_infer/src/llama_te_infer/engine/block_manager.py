"""The block tables of an engine's sequences: which pages each sequence has. No tensors, no device.

A page is a block of the cache, and `Sequence.pages` is the sequence's block table. Sequences of one request share the
full pages of their prompt, and prompts share the pages that the prefix cache knows.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from ..kv_cache.page_pool import PagePool
from ..runner.sequence import Request, Sequence
from .prefix_cache import PrefixCache


class BlockManager:
    """Gives pages to sequences, and takes them back.

    Args:
        total_num_pages: Pages of the cache.
        page_size: Tokens of a page.
        prefix_caching: Whether pages are kept after their sequences ended, for prompts with the same prefix.

    Attributes:
        pool: The pages.
        prefixes: The index of cached prompt prefixes. It takes pages from the pool, and gives them back.
        generation: How often the cached prefixes have been forgotten.
        unread: Pages of sequences that were removed before the results of their steps were read. They may have NaN.
        to_clear: Of these, the pages that other sequences have got since. The next step clears them first: attention
            multiplies what lies behind a text's last token by 0, and 0 times NaN is NaN.
    """

    def __init__(self, total_num_pages: int, page_size: int, prefix_caching: bool) -> None:
        self.pool = PagePool(total_num_pages, page_size)
        self.prefixes = PrefixCache(self.pool)
        self.prefix_caching = prefix_caching
        self.generation = 0
        self.unread: set[int] = set()
        self.to_clear: list[int] = []

    @property
    def available(self) -> int:
        """Number of pages that sequences can get."""
        return self.prefixes.available

    def pages_needed(self, request: Request) -> int:
        """Return how many pages a request may come to need when no other request runs."""
        pool, rows = self.pool, len(request.sequences)
        longest = pool.pages_for(request.longest - 1)  # the last token is not cached
        if request.has_beams:
            full = len(request.prompt) // pool.page_size
            return full + rows * (longest - full)
        beginning = pool.pages_for(len(request.prompt)) + (rows - 1 if len(request.prompt) % pool.page_size else 0)
        return max(longest, beginning)

    def most_tokens(self, prompt_length: int, n: int, num_beams: int) -> int:
        """Return how many tokens a request may write so that `pages_needed` is not more than there are."""
        pool = self.pool
        pages = pool.total_num_pages
        if num_beams > 1:
            full = prompt_length // pool.page_size
            pages = full + (pages - full) // num_beams
        elif pool.pages_for(prompt_length) + (n - 1 if prompt_length % pool.page_size else 0) > pages:
            return 0
        return max(0, pages * pool.page_size + 1 - prompt_length)  # the last token is not cached

    def reuses_prefix(self, request: Request) -> bool:
        """Return whether the prefix cache may provide the beginning of a request's prompt."""
        return self.prefix_caching and request.params.prompt_logprobs is None

    def allocate(self, sequences: Items[Sequence], headroom: int) -> bool:
        """Give sequences with a common prompt the pages that it needs, if enough are available.

        The first sequence gets pages for the whole prompt; the prefix cache provides those that it knows. Each of the
        others gets a page of its own for the end of the prompt, if that fills only a part of a page.

        Args:
            sequences: They have no pages.
            headroom: Pages that have to stay available.

        Returns:
            Whether the sequences got their pages; otherwise nothing has changed.
        """
        first, size = sequences[0], self.pool.page_size
        shared: list[int] = []
        if self.reuses_prefix(first.request):
            # The last token is computed in any case: the step needs its logits.
            shared = self.prefixes.match(first.tokens[:-1])
        self.prefixes.share(shared)
        own = self.pool.pages_for(len(first.tokens)) - len(shared)
        others = len(sequences) - 1 if len(first.tokens) % size else 0
        if self.available < own + others + headroom:
            self.prefixes.release(shared)
            return False
        first.pages = shared + self._take(own)
        first.cached = len(shared) * size
        for sequence in sequences:
            sequence.generation = self.generation
        for sequence in sequences[1:]:
            sequence.pages = self._take(1) if others else []
        return True

    def is_full(self, sequence: Sequence) -> bool:
        """Return whether the sequence's next token needs another page."""
        return sequence.cached == len(sequence.pages) * self.pool.page_size

    def append_pages(self, sequences: Items[Sequence]) -> list[tuple[Sequence, int, int]]:
        """Give one more page to each sequence; return the sequence, the index of the new entry and the page."""
        entries = []
        for sequence, page in zip(sequences, self._take(len(sequences)), strict=True):
            entries.append((sequence, len(sequence.pages), page))
            sequence.pages.append(page)
        return entries

    def fork(self, first: Sequence, other: Sequence) -> list[tuple[int, int]]:
        """Let another sequence continue the first one's prompt: share its full pages.

        Returns:
            The partly filled page and the other sequence's own page, which has to get a copy of it; or nothing.
        """
        full = len(first.tokens) // self.pool.page_size
        self.prefixes.share(first.pages[:full])
        copies = [(first.pages[full], own) for own in other.pages]
        other.pages = first.pages[:full] + other.pages
        other.cached = first.cached
        return copies

    def remember(self, sequence: Sequence, tokens: int) -> None:
        """Add the sequence's full pages to the prefix cache, unless its prefixes were forgotten since it got pages.

        Args:
            sequence: The sequence.
            tokens: How many of its tokens have their keys and values in the pages.
        """
        if self.prefix_caching and sequence.generation == self.generation:
            self.prefixes.remember(sequence.tokens[:tokens], sequence.pages)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache. Sequences that have pages keep them, and add nothing to the prefix cache later."""
        self.prefixes.clear()
        self.generation += 1

    def _take(self, count: int) -> list[int]:
        pages = self.prefixes.take(count)
        if self.unread:
            self.to_clear += self.unread.intersection(pages)
            self.unread.difference_update(pages)
        return pages

    def free(self, sequence: Sequence, is_read: bool = True) -> None:
        """Take a sequence's pages away.

        Args:
            sequence: The sequence.
            is_read: Whether the results of all steps that wrote its tokens have been read.
        """
        if not is_read:
            self.unread.update(sequence.pages)
        self.prefixes.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    def reorder(self, beams: Items[Sequence], sources: Items[int], length: int) -> None:
        """Record a reorder of beams on the device: each beam continues the first tokens of another beam.

        The device has shared the full pages of the sources' `length` tokens, and has copied the content of the page
        behind them to the beam's own page. Further steps may have been launched since; the pages behind are the beams'
        own. Beams that have lost their pages in the meantime stay without.

        Args:
            beams: All beams of a search.
            sources: The number of the beam that each beam continues.
            length: Tokens that they had in the cache.
        """
        full = length // self.pool.page_size
        before = [beam.pages for beam in beams]
        after = {
            beam: before[source][:full] + own[full:]
            for beam, (source, own) in enumerate(zip(sources, before, strict=True))
            if before[source][:full] != own[:full]
        }
        for pages in after.values():
            self.prefixes.share(pages)
        for beam, pages in after.items():
            self.prefixes.release(beams[beam].pages)
            beams[beam].pages = pages
