"""The scheduler, with a device of lists: every row must read back its own text through its pages, at every step."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from llama_te_infer.engine.scheduler import Scheduler
from llama_te_infer.runner.plan import Plan
from llama_te_infer.runner.sequence import Request, Sequence
from llama_te_infer.sampling_params import SamplingParams

SETTINGS = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def next_token(text: list[int], index: int) -> int:
    """Return the token that the device chooses after a text, for one of a request's sequences."""
    return 10 + (hash(tuple(text)) + 7 * index) % 5


def beam_sources(request: Request, length: int) -> list[int]:
    """Return the beam that each beam continues."""
    choose = random.Random(1000 * request.id + length)
    return [choose.randrange(len(request.sequences)) for _ in request.sequences]


class Device:
    """Pages of tokens, and a table and last token of each row, which follow the plans."""

    def __init__(self, pages: int, size: int) -> None:
        self.size = size
        self.memory: list[list[int | None]] = [[None] * size for _ in range(pages)]
        self.rows: list[dict[str, Any]] = []  # pages, length, text with the last token
        self.budget_used = 0

    def read(self, pages: list[int], count: int) -> list[int | None]:
        return [token for page in pages for token in self.memory[page]][:count]

    def write(self, pages: list[int], position: int, token: int) -> None:
        self.memory[pages[position // self.size]][position % self.size] = token

    def launch(self, plan: Plan) -> list[tuple[Any, ...]]:
        """Compute a step; return its choices, which are read later."""
        before = [dict(row, pages=list(row["pages"])) for row in self.rows]
        for to, source in plan.moves:
            self.rows[to] = before[source]
        assert len({row for move in plan.moves for row in move}) == 2 * len(plan.moves)
        del self.rows[len(plan.running) :]
        for sequence, index, page in plan.new_pages:
            pages = self.rows[sequence.row]["pages"]
            assert index == len(pages)
            pages.append(page)
        for row, sequence, start in zip(self.rows, plan.running, plan.starts, strict=True):
            assert row["of"] is sequence
            assert row["length"] == start == len(row["text"]) - 1
            assert self.read(row["pages"], start) == row["text"][:start], "a row lost tokens in the cache"
            self.write(row["pages"], start, row["text"][start])
            row["length"] += 1
        self.budget_used = sum(len(chunk.tokens) for chunk in plan.chunks)
        for chunk in plan.chunks:
            pages, text = chunk.sequence.pages, chunk.sequence.tokens
            assert chunk.tokens == text[chunk.start : chunk.start + len(chunk.tokens)]
            assert chunk.tokens
            assert self.read(pages, chunk.start) == text[: chunk.start], "a prompt's beginning is not in its pages"
            for position, token in enumerate(chunk.tokens, chunk.start):
                self.write(pages, position, token)
            assert bool(chunk.beginning) == (chunk.start + len(chunk.tokens) == len(text))
        for page, copy in plan.copies:
            self.memory[copy] = list(self.memory[page])
        for sequence in plan.beginning:
            assert sequence.row == len(self.rows)
            row = {"of": sequence, "pages": list(sequence.pages), "length": sequence.cached}
            self.rows.append({**row, "text": list(sequence.tokens)})
        return self.choose(plan)

    def choose(self, plan: Plan) -> list[tuple[Any, ...]]:
        chosen: list[tuple[Any, ...]] = []
        searches: dict[Request, list[dict[str, Any]]] = {}
        for row in self.rows:
            sequence = row["of"]
            if sequence.request.has_beams:
                searches.setdefault(sequence.request, []).append(row)
                continue
            token = next_token(row["text"], sequence.index)
            row["text"] = [*row["text"], token]
            chosen.append((sequence, token))
        for request, beams in searches.items():
            beams.sort(key=lambda row: row["of"].index)
            length, full = beams[0]["length"], beams[0]["length"] // self.size
            sources = [0] * len(beams) if beams[0]["of"] in plan.beginning else beam_sources(request, length)
            old = [dict(row, pages=list(row["pages"])) for row in beams]
            contents = [self.memory[row["pages"][full]] if length % self.size else [] for row in old]
            for row, source in zip(beams, sources, strict=True):
                row["pages"] = old[source]["pages"][:full] + row["pages"][full:]
                if length % self.size:
                    self.memory[row["pages"][full]] = list(contents[source])
                row["text"] = [*old[source]["text"], next_token(old[source]["text"], row["of"].index)]
            chosen.append((request, length, sources, [row["text"] for row in beams]))
        return chosen


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        rows=st.integers(1, 6),
        pages=st.integers(4, 14),
        size=st.sampled_from([1, 2, 4]),
        budget=st.sampled_from([1, 3, 8, 100]),
        prefix_caching=st.booleans(),
    )
    def begin(self, rows: int, pages: int, size: int, budget: int, prefix_caching: bool) -> None:
        self.scheduler = Scheduler(rows, pages, size, budget, prefix_caching)
        self.device = Device(pages, size)
        self.open: dict[int, Request] = {}
        self.pending: list[tuple[Any, ...]] = []
        self.number = 0
        self.first_read: list[int] = []  # ids in the order in which their prompts began

    @rule(seed=st.integers(0, 2**16))
    def submit(self, seed: int) -> None:
        choose = random.Random(seed)
        alike = [1, 2, 1, 1, 2, 1, 2, 2, 1]
        prompt = alike[: choose.randint(0, 9)] + [choose.randint(1, 2) for _ in range(choose.randint(0, 4))] or [3]
        kind = choose.choice([{}, {}, {"n": choose.randint(2, 3)}, {"num_beams": choose.randint(2, 3)}])
        scores = 0 if choose.random() < 0.1 else None
        params = SamplingParams(max_tokens=choose.randint(1, 14), prompt_logprobs=scores, **kind)
        request = Request(self.number, prompt, params)
        pool, size = self.scheduler.blocks.pool, self.device.size
        count = len(request.sequences)
        most = -(-(len(prompt) + params.max_tokens - 1) // size)
        full = len(prompt) // size
        needed = full + count * (most - full) if request.has_beams else most
        if not request.has_beams:
            needed = max(needed, -(-len(prompt) // size) + (count - 1) * (len(prompt) % size > 0))
        if count > self.scheduler.max_rows:
            with pytest.raises(ValueError, match=f"={count} sequences do not fit max_batch_size="):
                self.scheduler.submit(request)
        elif needed > pool.total_num_pages:
            with pytest.raises(ValueError, match=f"needs {needed} pages of {size} tokens, but total_num_pages="):
                self.scheduler.submit(request)
        else:
            self.scheduler.submit(request)
            self.open[request.id] = request
            self.number += 1

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 6))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            if self.open:
                self.step()
                self.every_page_and_row_is_accounted_for()

    def step(self) -> None:
        scheduler = self.scheduler
        queue = [group.request.id for group in scheduler.waiting]
        running = {sequence for sequence in scheduler.rows if not sequence.is_launched_whole}
        first = scheduler.running[0].sequences if scheduler.running else []
        plan = scheduler.plan()
        sent_away = [group for group in scheduler.waiting if group.request.id not in queue]
        lost = running - set(plan.running)
        assert all(sequence in scheduler._groups for sequence in lost)
        assert not lost & set(first), "the first group was sent away"
        if not lost and not sent_away:
            admitted = len(queue) - len(scheduler.waiting)
            assert queue[admitted:] == [group.request.id for group in scheduler.waiting], "someone was overtaken"
        for chunk in plan.chunks:
            if chunk.sequence.request.id not in self.first_read:
                self.first_read.append(chunk.sequence.request.id)
        chosen = self.device.launch(plan)
        assert self.device.budget_used <= scheduler.prefill_budget
        assert not plan.is_empty or self.pending, "nothing is computed and nobody waits for anything"
        pending, self.pending = self.pending, chosen
        self.read(pending)

    def read(self, chosen: list[tuple[Any, ...]]) -> None:
        for item in chosen:
            if isinstance(item[0], Sequence):
                sequence, token = item
                if sequence.finish_reason is not None:
                    continue
                sequence.tokens.append(token)
                ends = token == 10  # a stop token; the host notices it one step late
                if ends or len(sequence.written) == sequence.request.params.max_tokens:
                    self.finish(sequence.request, [sequence])
            else:
                request, length, sources, texts = item
                if request.is_finished:
                    continue
                if len(texts[0]) == request.longest or texts[0][-1] == 10:
                    self.finish(request, request.sequences)
                else:
                    self.scheduler.blocks.reorder(request.sequences, sources, length)

    def finish(self, request: Request, sequences: list[Sequence]) -> None:
        self.scheduler.remove(sequences)
        for sequence in sequences:
            sequence.finish_reason = "stop"
            if not request.has_beams:
                text = list(request.prompt)
                while len(text) < len(sequence.tokens):
                    text.append(next_token(text, sequence.index))
                assert sequence.tokens == text, "the text is not the one that it has alone"
        if request.is_finished:
            del self.open[request.id]

    @precondition(lambda self: self.open)
    @rule(seed=st.integers(0, 2**16))
    def cancel(self, seed: int) -> None:
        request = random.Random(seed).choice(list(self.open.values()))
        self.scheduler.remove(request.sequences)
        for sequence in request.sequences:
            sequence.finish_reason = "cancelled"
        del self.open[request.id]

    @invariant()
    def every_page_and_row_is_accounted_for(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler, pool = self.scheduler, self.scheduler.blocks.pool
        present = [sequence for group in [*scheduler.running, *scheduler.waiting] for sequence in group.sequences]
        assert len(present) == len(set(present)) == len(scheduler._groups)
        holders = Counter(page for sequence in present for page in sequence.pages)
        holders.update(list(scheduler.blocks.prefixes.remembered))
        assert pool.holders == [holders[page] for page in range(pool.total_num_pages)]
        assert sorted(pool.free) == [page for page in range(pool.total_num_pages) if not holders[page]]
        assert [sequence.row for sequence in scheduler.rows] == list(range(len(scheduler.rows)))
        assert set(scheduler.rows) == {sequence for sequence in present if sequence.row is not None}
        assert sum(len(group.sequences) for group in scheduler.running) <= scheduler.max_rows
        assert all(not sequence.pages for group in scheduler.waiting for sequence in group.sequences)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.open:
                break
            self.step()
            self.every_page_and_row_is_accounted_for()
        assert not self.open, "a request never finishes"
        assert self.first_read == sorted(self.first_read), "requests were not begun in their order"
        assert self.scheduler.blocks.pool.used == len(self.scheduler.blocks.prefixes.remembered)
        assert not self.scheduler.running and not self.scheduler.waiting and not self.scheduler.rows


def test_any_mix_of_requests() -> None:
    run_machine(SchedulerMachine, settings=SETTINGS)


def request(number: int, length: int, first: int = 1, **params: Any) -> Request:
    """A prompt of tokens that go up from `first`."""
    return Request(number, list(range(first, first + length)), SamplingParams(**{"max_tokens": 4, **params}))


def read(plan: Plan, token: int = 99) -> None:
    """Give each sequence its token."""
    for sequence in [*plan.running, *plan.beginning]:
        sequence.tokens.append(token)


def test_a_long_prompt_is_read_in_chunks_while_others_go_on() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=10)
    scheduler.submit(request(0, 3, max_tokens=20))
    read(scheduler.plan())
    scheduler.submit(request(1, 25))
    for expected in (10, 10, 5):
        plan = scheduler.plan()
        assert [len(chunk.tokens) for chunk in plan.chunks] == [expected]
        assert len(plan.running) == 1
        read(plan)
    assert len(scheduler.plan().running) == 2


def test_held_requests_wait_and_preempted_ones_before_them_do_not() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=10)
    for number in range(3):
        scheduler.submit(request(number, 3))
    read(scheduler.plan(held_from=2))
    assert [group.request.id for group in scheduler.running] == [0, 1]
    assert scheduler.preempt_all() == 2 and not scheduler.rows
    assert scheduler.blocks.available == scheduler.blocks.pool.total_num_pages and not scheduler.blocks.unread
    assert [group.request.id for group in scheduler.waiting] == [0, 1, 2]
    plan = scheduler.plan(held_from=2)
    # Their prompts, and the token that each of them has written.
    assert [(chunk.sequence.request.id, len(chunk.sequence.tokens)) for chunk in plan.chunks] == [(0, 4), (1, 4)]
    read(plan)
    assert [chunk.sequence.request.id for chunk in scheduler.plan().chunks] == [2]


def test_full_pages_of_an_earlier_prompt_are_not_read_again_but_its_last_token_is() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=100)
    scheduler.submit(request(0, 12))
    read(scheduler.plan())
    scheduler.submit(request(1, 12))
    scheduler.submit(request(2, 14))
    scheduler.submit(request(3, 14, prompt_logprobs=0))
    plan = scheduler.plan()
    assert [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks] == [(8, 4), (12, 2), (0, 14)]
    first = plan.running[0]
    assert plan.chunks[0].sequence.pages[:2] == first.pages[:2]
    assert plan.chunks[1].sequence.pages[:3] == first.pages[:3]
    assert not set(plan.chunks[2].sequence.pages) & set(first.pages)


def test_without_prefix_caching_nothing_is_remembered() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=100, prefix_caching=False)
    scheduler.submit(request(0, 12))
    read(scheduler.plan())
    scheduler.submit(request(1, 12))
    assert [chunk.start for chunk in scheduler.plan().chunks] == [0]


def test_sequences_of_one_prompt_share_its_full_pages() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=100)
    scheduler.submit(request(0, 6, n=3))
    plan = scheduler.plan()
    assert len(plan.chunks) == 1
    assert len({sequence.pages[0] for sequence in plan.beginning}) == 1
    assert len({sequence.pages[1] for sequence in plan.beginning}) == 3
    assert [page for page, _ in plan.copies] == [plan.beginning[0].pages[1]] * 2
    assert scheduler.blocks.pool.used == 4


def test_the_group_admitted_last_makes_room_and_goes_on_with_what_it_had() -> None:
    scheduler = Scheduler(4, 6, 2, prefill_budget=100)
    scheduler.submit(request(0, 3, max_tokens=8))
    read(scheduler.plan())
    scheduler.submit(request(1, 4, first=50, max_tokens=5))
    read(scheduler.plan())
    scheduler.submit(request(2, 4, first=90, max_tokens=5))
    plan = Plan()
    while not any(group.request.id == 1 for group in scheduler.waiting):
        plan = scheduler.plan()
        read(plan)
    assert [group.request.id for group in scheduler.waiting] == [1, 2]
    assert [sequence.request.id for sequence in plan.running] == [0]
    assert not plan.chunks, "the sequence was admitted before its last token is known"
    waiting = scheduler.waiting[0].sequences[0]
    tokens, available = list(waiting.tokens), scheduler.blocks.available
    assert len(waiting.written) > 1
    assert available > 0
    plan = Plan()
    while not plan.chunks:
        plan = scheduler.plan()
        read(plan)
    assert plan.chunks[0].tokens == tokens[plan.chunks[0].start :], "its written tokens are not computed again"
    assert plan.chunks[0].start > 0, "tokens in its remembered pages are computed again"


def test_what_was_sent_away_is_not_admitted_before_its_last_token_is_known() -> None:
    scheduler = Scheduler(4, 5, 2, prefill_budget=100)
    for number in range(2):  # both compute the prompt, so that the second one finds the first one's pages when it waits
        scheduler.submit(request(number, 4))
    read(scheduler.plan())
    plan = scheduler.plan()
    assert [sequence.request.id for sequence in plan.running] == [0]
    assert not plan.chunks
    read(plan)
    scheduler.waiting[0].sequences[0].tokens.append(99)  # which was on its way
    while not plan.chunks:
        plan = scheduler.plan()
        read(plan)
    assert plan.chunks[0].tokens[-1] == 99


def test_a_prompt_that_is_being_read_makes_room_too() -> None:
    scheduler = Scheduler(4, 8, 2, prefill_budget=1)
    scheduler.submit(request(0, 1, max_tokens=12))
    read(scheduler.plan())
    scheduler.submit(request(1, 10, first=50, max_tokens=1))
    plan = scheduler.plan()
    (reading,) = [chunk.sequence for chunk in plan.chunks]
    while plan.chunks:
        assert not scheduler.waiting
        read(plan)
        plan = scheduler.plan()
    assert [group.sequences for group in scheduler.waiting] == [[reading]]
    assert [sequence.request.id for sequence in plan.running] == [0]
    assert not reading.pages and not reading.cached


def test_a_request_that_would_take_the_running_ones_next_pages_waits() -> None:
    scheduler = Scheduler(4, 4, 2, prefill_budget=100)
    scheduler.submit(request(0, 3))
    read(scheduler.plan())
    scheduler.submit(request(1, 4, first=50, max_tokens=1))  # needs both free pages
    plan = scheduler.plan()
    assert not plan.chunks
    read(plan)
    scheduler.remove([scheduler.waiting[0].sequences[0]])
    scheduler.submit(request(2, 2, first=70, max_tokens=1))  # needs one of them
    assert scheduler.blocks.available == 2
    assert len(scheduler.rows[0].tokens) == 5


def test_a_sequence_leaves_when_its_last_token_is_launched() -> None:
    scheduler = Scheduler(4, 100, 4, prefill_budget=100)
    scheduler.submit(request(0, 3, max_tokens=2))
    first, second = scheduler.plan(), scheduler.plan()
    assert (len(first.beginning), len(second.running)) == (1, 1)
    assert scheduler.plan().is_empty
    assert not scheduler.rows
