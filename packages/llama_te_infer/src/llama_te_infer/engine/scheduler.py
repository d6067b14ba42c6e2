"""Decides which sequences the next step computes, and gives them rows and pages. No tensors, no device.

A step gives every running sequence one more token, and reads at most `prefill_budget` tokens of prompts. A longer
prompt is read in several steps and delays no other sequence.

The scheduler admits and preempts a `Group`: sequences with a common prompt that is read once. After the prefill each
sequence gets a row; beams stay a group, other sequences continue alone. The scheduler admits groups in the order of
their submission. A group needs

- a row for each of its sequences, and
- pages for its prompt (except those in the prefix cache), one page for each of its other sequences if the prompt does
  not fill its last page, and one page of headroom for each sequence admitted before.

When a running sequence needs a page and none is available, the group that was admitted last gives all of its pages
back, and waits at the head of the queue to be computed again: its prompt together with the tokens written so far, or
beams from their beginning. A request that could not run alone is refused, so the first group always continues.

The scheduler decides before the last step's tokens are known: it uses only the lengths of running sequences. It may
give pages away while launched steps still read them, since the device computes the steps in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from ..runner.plan import Chunk, Plan
from ..runner.sequence import Request, Sequence
from ..sampling_params import SamplingParams
from .block_manager import BlockManager


@dataclass(eq=False)
class Group:
    """Sequences that are admitted, and preempted, together. The first one's prompt is read for all."""

    sequences: list[Sequence]

    @property
    def request(self) -> Request:
        """The sequences' request."""
        return self.sequences[0].request

    @property
    def is_prefilling(self) -> bool:
        """Whether a part of the prompt is still to be read."""
        return self.sequences[0].row is None


class Scheduler:
    """Keeps the queue, the running batch and the pages.

    Args:
        max_rows: Sequences that run at the same time.
        total_num_pages: Pages of the cache.
        page_size: Tokens of a page.
        prefill_budget: Most tokens of prompts in a step.
        prefix_caching: Whether pages are kept after their sequences ended, for prompts with the same prefix.

    Attributes:
        blocks: The sequences' pages.
        waiting: Groups in the queue.
        running: Admitted groups, in the order of their admission.
        rows: The running batch.
    """

    def __init__(
        self,
        max_rows: int,
        total_num_pages: int,
        page_size: int,
        prefill_budget: int,
        prefix_caching: bool = True,
    ) -> None:
        self.max_rows, self.prefill_budget = max_rows, prefill_budget
        self.blocks = BlockManager(total_num_pages, page_size, prefix_caching)
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self.rows: list[Sequence] = []
        self._last_rows: list[int] = []  # the row of each row's sequence in the last step
        self._groups: dict[Sequence, Group] = {}  # of all sequences that run or wait

    def check_rows(self, params: SamplingParams) -> None:
        """Refuse requests with more sequences than rows.

        Raises:
            ValueError: There are fewer rows.
        """
        name, rows = ("num_beams", params.num_beams) if params.num_beams > 1 else ("n", params.n)
        if rows > self.max_rows:
            raise ValueError(
                f"{name}={rows} sequences do not fit max_batch_size={self.max_rows}: make it larger, or ask for less."
            )

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises:
            ValueError: It could never run; the queue has not changed.
        """
        self.check_rows(request.params)
        pool, rows = self.blocks.pool, len(request.sequences)
        needed = self.blocks.pages_needed(request)
        if needed > pool.total_num_pages:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens with max_tokens={request.params.max_tokens} and {rows} "
                f"sequence(s) needs {needed} pages of {pool.page_size} tokens, but total_num_pages="
                f"{pool.total_num_pages}: make it larger, or ask for less."
            )
        self.waiting.append(self._group(list(request.sequences)))

    def plan(self, held_from: int | None = None) -> Plan:
        """Plan the next step. The lengths of sequences are then those after the step.

        This is the one place on the host where a decoding step's token is added to a length: see `StepInputs`.

        Args:
            held_from: Requests with this id and larger ones stay in the queue; `None` for none.
        """
        plan = Plan()
        self._retire()
        self._extend(plan)
        plan.moves = [(row, last) for row, last in enumerate(self._last_rows) if row != last]
        plan.running = list(self.rows)
        plan.starts = [sequence.cached for sequence in self.rows]
        for sequence in self.rows:
            sequence.cached += 1
        self._prefill(plan, held_from)
        plan.lengths = [sequence.cached for sequence in self.rows]
        plan.cleared, self.blocks.to_clear = self.blocks.to_clear, []
        self._last_rows = list(range(len(self.rows)))
        return plan

    def remove(self, sequences: Items[Sequence], is_read: bool = True) -> None:
        """Let sequences end, whether they run, wait or have left already. Beams are removed together.

        Args:
            sequences: The sequences.
            is_read: Whether they end by what a step has found, and not in the middle.
        """
        for sequence in sequences:
            group = self._groups.pop(sequence, None)
            if group is None:
                continue
            self._release(sequence, is_read)
            group.sequences.remove(sequence)
            if not group.sequences:
                groups = self.running if group in self.running else self.waiting
                groups.remove(group)

    def preempt_all(self) -> int:
        """Send all groups back to the queue, and return their number. No step may be in progress."""
        preempted = len(self.running)
        while self.running:
            self._preempt(is_read=True)
        return preempted

    # --- running sequences --------------------------------------------------------------------------------------------

    def _retire(self) -> None:
        """Remove sequences whose last token a launched step chooses: they need neither a row nor a page."""
        for group in list(self.running):
            if not group.is_prefilling and group.sequences[0].is_launched_whole:
                self.remove(list(group.sequences))

    def _extend(self, plan: Plan) -> None:
        """Give every running sequence room for one more token, and preempt groups for it."""
        for index, group in enumerate(self.running):
            if group.is_prefilling:
                continue
            full = [sequence for sequence in group.sequences if self.blocks.is_full(sequence)]
            if not full:
                continue
            while self.blocks.available < len(full) and len(self.running) > index:
                self._preempt()
                plan.preempted += 1
            if len(self.running) == index:
                break  # the group itself was the last one
            plan.new_pages += self.blocks.append_pages(full)

    def _preempt(self, is_read: bool = False) -> None:
        """Send the group that was admitted last back to the head of the queue."""
        group = self.running.pop()
        for sequence in group.sequences:
            self._release(sequence, is_read)
        self.waiting.appendleft(group)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _prefill(self, plan: Plan, held_from: int | None) -> None:
        budget = self.prefill_budget
        for group in self.running:
            if group.is_prefilling and budget > 0:
                budget -= self._read(group, budget, plan)
        # Not in a step that preempted a group: that group's last token is not known yet.
        while not plan.preempted and budget > 0 and self._may_begin(held_from) and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            budget -= self._read(self.running[-1], budget, plan)
        if plan.beginning:
            self.running = [part for group in self.running for part in self._parts(group)]
        for chunk in plan.chunks:  # after all are planned, since the chunks of a step do not wait for each other
            self.blocks.remember(chunk.sequence, chunk.start + len(chunk.tokens))

    def _may_begin(self, held_from: int | None) -> bool:
        # Preempted groups wait in front of all others, so those that are held are behind the rest.
        return bool(self.waiting) and (held_from is None or self.waiting[0].request.id < held_from)

    def _admit(self, group: Group) -> bool:
        """Give a group its pages, if there are rows and pages for it."""
        reserved = sum(len(other.sequences) for other in self.running)
        if reserved + len(group.sequences) > self.max_rows:
            return False
        return self.blocks.allocate(group.sequences, headroom=reserved)

    def _read(self, group: Group, budget: int, plan: Plan) -> int:
        """Plan the next part of a group's prompt; return its number of tokens."""
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
        """Give rows to the sequences of a group whose prompt is read, and the rest of their pages."""
        first = group.sequences[0]
        for sequence in group.sequences:
            if sequence is not first:
                plan.copies += self.blocks.fork(first, sequence)
            sequence.row = len(self.rows)
            self.rows.append(sequence)
            plan.beginning.append(sequence)

    def _parts(self, group: Group) -> list[Group]:
        """Split a group whose prompt is read into single sequences, unless they are beams."""
        if group.is_prefilling or group.request.has_beams or len(group.sequences) == 1:
            return [group]
        return [self._group([sequence]) for sequence in group.sequences]

    def _group(self, sequences: list[Sequence]) -> Group:
        group = Group(sequences)
        self._groups.update(dict.fromkeys(sequences, group))
        return group

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _release(self, sequence: Sequence, is_read: bool) -> None:
        """Take a sequence's row and pages away. The prefix cache remembers the content of its pages."""
        if sequence.row is not None:
            last, last_row = self.rows.pop(), self._last_rows.pop()
            if last is not sequence:
                self.rows[sequence.row], self._last_rows[sequence.row] = last, last_row
                last.row = sequence.row
            if not sequence.request.has_beams:
                self.blocks.remember(sequence, sequence.cached)
        self.blocks.free(sequence, is_read)
        sequence.row = None
