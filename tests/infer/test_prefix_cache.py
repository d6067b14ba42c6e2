"""The prefix cache, against a list of all texts that it ever remembered."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from llama_te_infer.engine.prefix_cache import PrefixCache
from llama_te_infer.kv_cache.page_pool import PagePool

SETTINGS = settings(max_examples=150, stateful_step_count=40, deadline=None, database=None, derandomize=True)


class CacheMachine(RuleBasedStateMachine):
    """Pages hold their tokens and all tokens before. The pages of a match must hold the text that was looked up."""

    @initialize(total=st.integers(1, 10), page_size=st.sampled_from([1, 2, 3]))
    def begin(self, total: int, page_size: int) -> None:
        self.cache = PrefixCache(PagePool(total, page_size))
        self.memory: dict[int, tuple[int, ...]] = {}  # for each page, the text up to its end
        self.texts: list[tuple[list[int], list[int]]] = []  # tokens and pages of running texts

    @rule(seed=st.integers(0, 2**16), length=st.integers(0, 9))
    def write(self, seed: int, length: int) -> None:
        choose, size = random.Random(seed), self.cache.pool.page_size
        text = [choose.randrange(2) for _ in range(length)]  # few tokens, so that many texts begin alike
        matched = self.cache.match(text)
        assert len(matched) <= length // size
        for index, page in enumerate(matched):
            assert self.memory[page] == tuple(text[: (index + 1) * size])
        self.cache.share(matched)
        more = -(-length // size) - len(matched)
        if more > self.cache.available:
            self.cache.release(matched)
            return
        pages = matched + self.cache.take(more)
        assert len(set(pages)) == len(pages)
        held = {page for _, others in self.texts for page in others}
        assert not held & set(pages[len(matched) :]), "a page was taken from a text under way"
        for index in range(len(matched), len(pages)):
            self.memory[pages[index]] = tuple(text[: (index + 1) * size])
        self.texts.append((text, pages))

    @rule(seed=st.integers(0, 2**16))
    def remember(self, seed: int) -> None:
        if self.texts:
            text, pages = random.Random(seed).choice(self.texts)
            self.cache.remember(text, pages)
            assert len(self.cache.match(text)) == len(text) // self.cache.pool.page_size

    @rule(seed=st.integers(0, 3))
    def clear(self, seed: int) -> None:
        if seed == 0:
            self.cache.clear()
            assert not self.cache.remembered and not any(self.cache.match(text) for text, _ in self.texts)

    @rule(seed=st.integers(0, 2**16))
    def end(self, seed: int) -> None:
        if self.texts:
            _, pages = self.texts.pop(random.Random(seed).randrange(len(self.texts)))
            self.cache.release(pages)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        pool = self.cache.pool
        held = [page for _, pages in self.texts for page in pages]
        remembered = set(self.cache.remembered)
        assert pool.holders == [held.count(page) + (page in remembered) for page in range(pool.total_num_pages)]
        assert sorted(pool.free) == [page for page, holders in enumerate(pool.holders) if holders == 0]
        assert set(self.cache._idle) == remembered - set(held)
        assert self.cache.available == pool.total_num_pages - len(set(held))
        assert len(remembered) == len(self.cache._entries)


def test_any_sequence_of_texts() -> None:
    run_state_machine_as_test(CacheMachine, settings=SETTINGS)


def written(cache: PrefixCache, text: list[int]) -> list[int]:
    """A text that was written, is remembered and has ended; its pages."""
    pages = cache.take(-(-len(text) // cache.pool.page_size))
    cache.remember(text, pages)
    cache.release(pages)
    return pages


def test_the_least_recently_used_text_goes_first_and_its_end_before_its_beginning() -> None:
    cache = PrefixCache(PagePool(6, 2))
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    written(cache, old)
    written(cache, new)
    again = cache.match(old)
    cache.share(again)  # used once more, so that the other one is the oldest
    cache.release(again)
    cache.take(3)
    assert len(cache.match(new)) == 1
    assert len(cache.match(old)) == 2
    cache.take(2)
    assert cache.match(new) == []
    assert len(cache.match(old)) == 1


def test_what_followed_a_page_that_is_gone_is_not_found_behind_its_next_content() -> None:
    cache = PrefixCache(PagePool(4, 1))
    first, second = cache.take(2)
    cache.remember([7, 8], [first, second])
    cache.release([first])  # the second page stays in use, and the first one is taken for another text
    other = cache.take(3)
    assert first in other
    cache.remember([9], [first])
    assert cache.match([9, 8]) == [first]
    cache.remember([9, 8], [first, second])
    assert cache.match([9, 8]) == [first, second]


def test_a_page_that_is_only_partly_full_is_not_remembered() -> None:
    cache = PrefixCache(PagePool(4, 4))
    written(cache, [1, 2, 3, 4, 5])
    assert len(cache.match([1, 2, 3, 4, 5])) == 1
    assert cache.match([1, 2, 3]) == []
    assert len(cache.remembered) == 1


def test_too_few_pages_is_an_error_before_anything_is_given_up() -> None:
    cache = PrefixCache(PagePool(3, 1))
    written(cache, [1, 2])
    with pytest.raises(ValueError, match="4 pages are asked for, and 1 of 3 are free"):
        cache.take(4)
    assert len(cache.remembered) == 2
