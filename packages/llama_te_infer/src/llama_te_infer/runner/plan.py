"""The plan of one step. The scheduler makes it and the runner launches it. It holds no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from .sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt to be read.

    Attributes:
        sequence: The prompt's sequence, with the pages for the whole prompt.
        tokens: The part.
        start: Tokens before it.
        beginning: The sequences that get rows after the last part; none after the others.
    """

    sequence: Sequence
    tokens: list[int]
    start: int
    beginning: list[Sequence]


@dataclass
class Plan:
    """A step. Pages are cleared, rows move, the running rows decode, chunks are read, pages are copied, new rows begin.

    Attributes:
        moves: Pairs of a row and the row of the last step whose content it gets. No row is in two pairs.
        running: The sequences that decode, in rows 0, 1, ...
        starts: Tokens of each of them in the cache before the step.
        new_pages: A decoding sequence, the index of an entry in its list of pages, and the new page there.
        chunks: Parts of prompts.
        beginning: The sequences whose prompts these chunks complete, in the rows behind the running ones.
        copies: Pairs of a page and the page that gets a copy of it.
        lengths: Tokens in the cache after the step, of the running and the beginning sequences.
        cleared: Pages that may have NaN of other sequences.
        preempted: How many groups of sequences gave their pages back.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    new_pages: list[tuple[Sequence, int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    beginning: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)
    preempted: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and not self.chunks
