"""Who computes what in the next step, and which pages and rows they have. No tensors, no device.

A step gives every running sequence one token more, and reads at most `prefill_budget` tokens of prompts; a longer
prompt is read in several steps and holds nobody up.

What is scheduled as one is a `Group`: sequences with a common prompt that is read once. When it has been read, each
gets a row; beams stay a group, others go on alone. A group is admitted, in the order of submission, if there are

- a row for each of its sequences, and
- pages for its prompt (less those that the prefix cache has), for the partly filled last page of each of its other
  sequences, and one page of headroom for each sequence that was admitted before it.

When a running sequence needs a page and none is available, the group that was admitted last gives all of its own back,
and waits at the head of the queue to be computed again: the prompt together with what was written, or beams from their
beginning. As a request that could not run alone is refused, the first group always goes on.

Decisions are made before the last step's tokens are known: of a running sequence only the length is used. Pages may be
given to others while launched steps still read them, since the device takes the steps in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ..kv_cache.page_pool import PagePool
from .prefix_cache import PrefixCache
from .sequence import Request, Sequence


@dataclass(eq=False)
class Group:
    """Sequences that are admitted, and given up, together. The first one's prompt is read for all."""

    sequences: list[Sequence]

    @property
    def request(self) -> Request:
        """Whose sequences they are."""
        return self.sequences[0].request

    @property
    def is_reading(self) -> bool:
        """Whether the prompt is not read to its end."""
        return self.sequences[0].row is None


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to be read.

    Attributes:
        sequence: Whose prompt it is, with the pages for all of it.
        tokens: The part.
        start: Tokens before it.
        beginning: The sequences that get rows after it: none, if it is not the last part.
    """

    sequence: Sequence
    tokens: list[int]
    start: int
    beginning: list[Sequence]


@dataclass
class Plan:
    """A step. First rows move, then the running ones decode and chunks are read, then pages are copied and rows begin.

    Attributes:
        moves: Pairs of a row and the row whose place it was in the step before. No row is in two pairs.
        running: The sequences that decode, in rows 0, 1, ...
        starts: Tokens that each of them has in the cache before the step.
        new_pages: A sequence that decodes, a place in its list of pages, and the page that it got there.
        chunks: Parts of prompts.
        beginning: The sequences whose prompts these chunks complete, in the rows behind the running ones.
        copies: Pairs of a page and the page that what it holds is copied to.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    new_pages: list[tuple[Sequence, int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    beginning: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.chunks


class Scheduler:
    """Keeps the queue, the running batch and the pages.

    Args:
        max_rows: Sequences that run at the same time.
        total_num_pages: Pages of the cache.
        page_size: Tokens of a page.
        prefill_budget: Most tokens of prompts in a step.
        prefix_caching: Whether pages are kept after their sequences ended, for prompts that begin alike.
    """

    def __init__(
        self,
        max_rows: int,
        total_num_pages: int,
        page_size: int,
        prefill_budget: int,
        prefix_caching: bool = True,
    ) -> None:
        self.max_rows, self.prefill_budget, self.prefix_caching = max_rows, prefill_budget, prefix_caching
        self.pages = PrefixCache(PagePool(total_num_pages, page_size))
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []  # in the order of their admission
        self.rows: list[Sequence] = []
        self._places: list[int] = []  # of each row, the row that it was in the last step
        self._groups: dict[Sequence, Group] = {}  # of all that run or wait

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: It could never run; the queue has not changed.
        """
        pool, rows = self.pages.pool, len(request.sequences)
        if rows > self.max_rows:
            name = "num_beams" if request.has_beams else "n"
            raise ValueError(
                f"{name}={rows} sequences do not fit max_batch_size={self.max_rows}: make it larger, or ask for less."
            )
        needed = self._pages_alone(request)
        if needed > pool.total_num_pages:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens with max_tokens={request.params.max_tokens} and {rows} "
                f"sequence(s) needs {needed} pages of {pool.page_size} tokens, but total_num_pages="
                f"{pool.total_num_pages}: make it larger, or ask for less."
            )
        self.waiting.append(self._group(list(request.sequences)))

    def plan(self) -> Plan:
        """Decide on the next step, as if it was launched: sequences have the tokens that it will give them."""
        plan = Plan()
        self._retire()
        may_admit = self._extend(plan)
        plan.moves = [(row, place) for row, place in enumerate(self._places) if row != place]
        plan.running = list(self.rows)
        plan.starts = [sequence.cached for sequence in self.rows]
        for sequence in self.rows:
            sequence.cached += 1
        self._read_prompts(plan, may_admit)
        self._places = list(range(len(self.rows)))
        return plan

    def remove(self, sequences: Items[Sequence]) -> None:
        """Let sequences end, whether they run, wait or have left already. Beams are removed together."""
        for sequence in sequences:
            group = self._groups.pop(sequence, None)
            if group is None:
                continue
            self._release(sequence)
            group.sequences.remove(sequence)
            if not group.sequences:
                groups = self.running if group in self.running else self.waiting
                groups.remove(group)

    def reorder(self, beams: Items[Sequence], sources: Items[int], length: int) -> None:
        """Take note of what the device did: each beam goes on from another one's first tokens.

        The device has shared the full pages of the sources' `length` tokens, and has copied what was in the page behind
        them into the beam's own page. It may have gone on since: pages behind are the beams' own. Beams that have lost
        their pages in the meantime stay without.

        Args:
            beams: All beams of a search.
            sources: For each the number of the beam that it goes on from.
            length: Tokens that they had in the cache.
        """
        full = length // self.pages.pool.page_size
        before = [beam.pages for beam in beams]
        after = {
            beam: before[source][:full] + own[full:]
            for beam, (source, own) in enumerate(zip(sources, before, strict=True))
            if before[source][:full] != own[:full]
        }
        for pages in after.values():
            self.pages.share(pages)
        for beam, pages in after.items():
            self.pages.release(beams[beam].pages)
            beams[beam].pages = pages

    # --- the running ones ---------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Let go of sequences whose last token is on its way: it needs neither a row nor a page."""
        for group in list(self.running):
            if not group.is_reading and group.sequences[0].is_launched_whole:
                self.remove(list(group.sequences))

    def _extend(self, plan: Plan) -> bool:
        """Give every running sequence room for one token more; returns whether none had to be sent away for it."""
        size, admitted = self.pages.pool.page_size, len(self.running)
        for place, group in enumerate(self.running):
            if group.is_reading:
                continue
            needing = [sequence for sequence in group.sequences if sequence.cached == len(sequence.pages) * size]
            if not needing:
                continue
            while self.pages.available < len(needing) and len(self.running) > place:
                self._preempt()
            if len(self.running) == place:
                break  # it was the last one itself
            for sequence, page in zip(needing, self.pages.take(len(needing)), strict=True):
                plan.new_pages.append((sequence, len(sequence.pages), page))
                sequence.pages.append(page)
        return len(self.running) == admitted

    def _preempt(self) -> None:
        """Send the group that was admitted last back to the queue's head."""
        group = self.running.pop()
        for sequence in group.sequences:
            self._release(sequence)
        self.waiting.appendleft(group)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _read_prompts(self, plan: Plan, may_admit: bool) -> None:
        budget = self.prefill_budget
        for group in self.running:
            if group.is_reading and budget > 0:
                budget -= self._read(group, budget, plan)
        # Not in a step that sent a group away: the last token of that one is not known yet.
        while may_admit and budget > 0 and self.waiting and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            budget -= self._read(self.running[-1], budget, plan)
        if plan.beginning:
            self.running = [part for group in self.running for part in self._parts(group)]
        if self.prefix_caching:  # only now, since a step's chunks do not wait for each other
            for chunk in plan.chunks:
                self.pages.remember(chunk.sequence.tokens[: chunk.start + len(chunk.tokens)], chunk.sequence.pages)

    def _admit(self, group: Group) -> bool:
        """Give a group pages, if there are rows and pages for it."""
        reserved = sum(len(other.sequences) for other in self.running)
        if reserved + len(group.sequences) > self.max_rows:
            return False
        pool, first = self.pages.pool, group.sequences[0]
        shared: list[int] = []
        if self.prefix_caching and not group.request.params.prompt_logprobs:
            # The last token is computed in any case: its logits are wanted.
            shared = self.pages.match(first.tokens[:-1])
        self.pages.share(shared)
        own = pool.pages_for(len(first.tokens)) - len(shared)
        others = len(group.sequences) - 1 if len(first.tokens) % pool.page_size else 0
        if self.pages.available < own + others + reserved:
            self.pages.release(shared)
            return False
        first.pages = shared + self.pages.take(own)
        first.cached = len(shared) * pool.page_size
        for sequence in group.sequences[1:]:
            sequence.pages = self.pages.take(1) if others else []
        return True

    def _read(self, group: Group, budget: int, plan: Plan) -> int:
        """Plan the next part of a group's prompt; returns its tokens."""
        first = group.sequences[0]
        start = first.cached
        tokens = first.tokens[start : start + budget]
        first.cached += len(tokens)
        is_last = first.cached == len(first.tokens)
        plan.chunks.append(Chunk(first, tokens, start, list(group.sequences) if is_last else []))
        if is_last:
            self._begin(group, plan)
        return len(tokens)

    def _begin(self, group: Group, plan: Plan) -> None:
        """Give the sequences of a group whose prompt has been read rows, and all of its pages."""
        first = group.sequences[0]
        full = len(first.tokens) // self.pages.pool.page_size
        for sequence in group.sequences:
            if sequence is not first:
                self.pages.share(first.pages[:full])
                plan.copies += [(first.pages[full], own) for own in sequence.pages]
                sequence.pages = first.pages[:full] + sequence.pages
                sequence.cached = first.cached
            sequence.row = len(self.rows)
            self.rows.append(sequence)
            plan.beginning.append(sequence)

    def _parts(self, group: Group) -> list[Group]:
        """Sequences that are no beams go on alone when their prompt has been read."""
        if group.is_reading or group.request.has_beams or len(group.sequences) == 1:
            return [group]
        return [self._group([sequence]) for sequence in group.sequences]

    def _group(self, sequences: list[Sequence]) -> Group:
        group = Group(sequences)
        self._groups.update(dict.fromkeys(sequences, group))
        return group

    # --- the ends -----------------------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence's row and pages away; what the pages hold is remembered."""
        if sequence.row is not None:
            last, place = self.rows.pop(), self._places.pop()
            if last is not sequence:
                self.rows[sequence.row], self._places[sequence.row] = last, place
                last.row = sequence.row
            if self.prefix_caching and not sequence.request.has_beams:
                self.pages.remember(sequence.tokens[: sequence.cached], sequence.pages)
        self.pages.release(sequence.pages)
        sequence.row, sequence.pages, sequence.cached = None, [], 0

    def _pages_alone(self, request: Request) -> int:
        """Pages that a request may come to need when nobody else runs."""
        pool, rows = self.pages.pool, len(request.sequences)
        longest = pool.pages_for(request.longest - 1)  # a last token is not cached
        if request.has_beams:
            full = len(request.prompt) // pool.page_size
            return full + rows * (longest - full)
        beginning = pool.pages_for(len(request.prompt)) + (rows - 1 if len(request.prompt) % pool.page_size else 0)
        return max(longest, beginning)
