"""The pages of rows and their pool, against rows whose pages are written out in full."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from llama_te_infer.kv_cache.row_pages import RowPages

SETTINGS = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


class PoolMachine(RuleBasedStateMachine):
    """Pages hold tokens here, and each row must read back the tokens that it was given."""

    @initialize(total=st.integers(1, 12), page_size=st.sampled_from([1, 2, 4]))
    def begin(self, total: int, page_size: int) -> None:
        self.row_pages = RowPages(total, page_size)
        self.pool = self.row_pages.pool
        self.memory: list[list[int]] = [[-1] * page_size for _ in range(total)]
        self.pages: list[list[int]] = []
        self.tokens: list[list[int]] = []
        self.next_token = 0

    def read(self, pages: list[int], count: int) -> list[int]:
        return [token for page in pages for token in self.memory[page]][:count]

    @rule(seed=st.integers(0, 2**16), rows=st.integers(0, 4), most=st.integers(0, 6))
    def assign(self, seed: int, rows: int, most: int) -> None:
        choose = random.Random(seed)
        size = self.pool.page_size
        sources = [choose.choice([None, *range(len(self.pages))]) for _ in range(rows)]
        if choose.random() < 0.5 and rows >= len(self.pages):  # as in most steps, all rows continue
            sources[: len(self.pages)] = range(len(self.pages))
        wholes = [0 if source is None else len(self.tokens[source]) for source in sources]
        starts = [whole if choose.random() < 0.7 else choose.randint(0, whole) for whole in wholes]
        lengths = [start + choose.randint(0, most) for start in starts]
        kept = [
            [] if source is None else self.tokens[source][:start] for source, start in zip(sources, starts, strict=True)
        ]
        state = (list(self.pool.holders), sorted(self.pool.free))

        # The least number of pages: rows may share pages that they keep whole, not pages that they write to.
        shared = {
            self.pages[source][index]
            for source, start, length in zip(sources, starts, lengths, strict=True)
            if source is not None
            for index in range(-(-start // size))
            if (index + 1) * size <= start or length == start
        }
        own = sum(
            -(-length // size) - start // size for start, length in zip(starts, lengths, strict=True) if length > start
        )
        needed = len(shared) + own
        if needed > self.pool.total_num_pages:
            message = f"{self.pool.total_num_pages} pages of {size} tokens are not enough"
            with pytest.raises(ValueError, match=message) as raised:
                self.row_pages.assign(sources, starts, lengths)
            assert f"for rows of {lengths} tokens" in str(raised.value)
            assert state == (list(self.pool.holders), sorted(self.pool.free))
            return
        copies = self.row_pages.assign(sources, starts, lengths)
        assert self.pool.used == needed
        targets = [to for _, to in copies]
        assert len(set(targets)) == len(targets)
        assert not set(targets) & {page for page, _ in copies}
        for page, to in copies:
            self.memory[to] = list(self.memory[page])
        self.pages, self.tokens = self.row_pages.rows, kept
        for row, start, length in zip(range(rows), starts, lengths, strict=True):
            for index in range(start, length):
                self.memory[self.pages[row][index // size]][index % size] = self.next_token
                self.tokens[row].append(self.next_token)
                self.next_token += 1

    @rule(seed=st.integers(0, 2**16))
    def replace(self, seed: int) -> None:
        """Beams are reordered; a row keeps its own partly filled page."""
        choose, size = random.Random(seed), self.pool.page_size
        sources = [
            choose.choice([i for i, other in enumerate(self.tokens) if len(other) == len(row)]) for row in self.tokens
        ]
        full = [len(row) // size for row in self.tokens]
        rows = [self.pages[s][:f] + row[f:] for s, f, row in zip(sources, full, self.pages, strict=True)]
        last = {row[-1] for row, f in zip(self.pages, full, strict=True) if len(row) > f}
        if any(self.pool.holders[page] > 1 for page in last):
            return  # then rows are reordered by `assign`
        contents = [
            list(self.memory[self.pages[s][f]]) if len(row) > f else None
            for s, f, row in zip(sources, full, self.pages, strict=True)
        ]
        self.row_pages.replace(rows)
        self.pages, self.tokens = rows, [list(self.tokens[source]) for source in sources]
        for row, content in zip(rows, contents, strict=True):
            if content is not None:
                self.memory[row[-1]] = content

    @invariant()
    def rows_read_back(self) -> None:
        if not hasattr(self, "pool"):
            return
        for pages, tokens in zip(self.pages, self.tokens, strict=True):
            assert self.read(pages, len(tokens)) == tokens
            assert len(pages) == -(-len(tokens) // self.pool.page_size)
            assert len(set(pages)) == len(pages)
        holders = Counter(page for row in self.pages for page in row)
        assert self.pool.holders == [holders[page] for page in range(self.pool.total_num_pages)]
        assert sorted(self.pool.free) == [page for page in range(self.pool.total_num_pages) if not holders[page]]


def test_any_sequence_of_assignments() -> None:
    run_state_machine_as_test(PoolMachine, settings=SETTINGS)


def test_steps_within_a_page_take_nothing() -> None:
    row_pages = RowPages(3, 4)
    row_pages.assign([None], [0], [2])
    rows = [list(row) for row in row_pages.rows]
    assert row_pages.assign([0], [2], [4]) == []
    assert row_pages.rows == rows
    assert row_pages.pool.used == 1


def test_a_shared_page_is_copied_once_less_than_it_is_written() -> None:
    row_pages = RowPages(8, 4)
    row_pages.assign([None], [0], [6])
    last = row_pages.rows[0][1]
    assert row_pages.assign([0, 0, 0], [6, 6, 6], [6, 6, 6]) == []
    assert row_pages.pool.used == 2
    copies = row_pages.assign([0, 1, 2], [6, 6, 6], [7, 7, 7])
    assert len(copies) == 2
    assert {page for page, _ in copies} == {last}
    assert row_pages.pool.used == 4
    with pytest.raises(
        ValueError, match=r"8 pages of 4 tokens are not enough: 6 more are needed for rows of \[16, 16, 13\]"
    ):
        row_pages.assign([0, 1, 2], [7, 7, 7], [16, 16, 13])
