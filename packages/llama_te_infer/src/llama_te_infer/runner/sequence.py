"""Requests, and the sequences that the scheduler and the runner compute for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..sampling_params import SamplingParams
from .beam_search import BeamTexts
from .grammar import Grammar, GrammarText
from .mask_workers import Allowance
from .stopping import FinishReason, StopRule


@dataclass(eq=False)
class Sequence:
    """A text in progress: a row of the running batch, or a sequence that waits.

    Attributes:
        request: The request that it belongs to.
        index: Its number in the request: the completion's, or the beam's.
        tokens: The prompt, and the tokens read back from the device. Beams have the prompt only.
        pages: Of the cache; for beams as far as the host knows (see `BlockManager.reorder`).
        cached: Tokens whose keys and values the launched steps write. While the sequence runs it has one token more,
            which the last of these steps chooses.
        generation: The generation of cached prefixes (see `BlockManager`) in which it got its pages.
        grammar: How far the tokens have come in the request's grammar; `None` without one, and for beams.
        row: Its row in the running batch; `None` while it waits, while its prompt is read, and after its end.
        finish_reason: Set at the end.
        stop_reason: Likewise.
        last_token: When the host read its last token, in seconds of `time.monotonic()`.
    """

    request: Request
    index: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    generation: int = 0
    grammar: GrammarText | None = None
    row: int | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    last_token: float | None = None

    @property
    def written(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def is_launched_whole(self) -> bool:
        """Whether the launched steps choose all tokens that the sequence may have."""
        return self.request.stop.is_complete(self.cached + 1 - len(self.request.prompt))


@dataclass(eq=False)
class Request:
    """A prompt and its parameters.

    Attributes:
        id: Numbers requests in the order of their submission.
        prompt: Its tokens.
        params: How to continue it.
        seed: Of the random choices.
        eos_token_ids: The model's EOS tokens.
        special_stops: The stop strings that are special tokens, and their ids.
        bad_words: The tokens of each word that must not be written.
        grammar: Of the texts; `None` for any text.
        stop: When its sequences end.
        sequences: `n` of them, or one for each beam.
        beam_texts: The texts of a search with stop strings or a grammar.
        mask_time: For the masks of its grammar.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    special_stops: dict[str, int] = field(default_factory=dict)
    bad_words: list[list[int]] = field(default_factory=list)
    grammar: Grammar | None = None
    stop: StopRule = field(init=False)
    sequences: list[Sequence] = field(init=False)
    beam_texts: BeamTexts | None = field(default=None, init=False)
    mask_time: Allowance = field(default_factory=Allowance, init=False)

    def __post_init__(self) -> None:
        self.stop = StopRule.of(self.params, self.eos_token_ids, self.special_stops)
        count = max(self.params.n, self.params.num_beams)
        self.sequences = [Sequence(self, index, list(self.prompt)) for index in range(count)]
        if not self.has_beams:
            for sequence in self.sequences:
                sequence.grammar = self.begin_grammar()

    def begin_grammar(self) -> GrammarText | None:
        """Return a text without tokens in the request's grammar, if it has one."""
        if self.grammar is None:
            return None
        # A beam without tokens before `min_tokens` is no error: other beams may go on.
        stop = replace(self.stop, min_tokens=0) if self.has_beams else self.stop
        return self.grammar.begin(stop, self.mask_time, self.params.allowed_token_ids, self.bad_words)

    @property
    def longest(self) -> int:
        """Most tokens of a sequence, the prompt's included."""
        return len(self.prompt) + self.stop.max_tokens

    @property
    def has_beams(self) -> bool:
        """Whether the sequences are beams of one search."""
        return self.params.num_beams > 1

    @property
    def is_finished(self) -> bool:
        """Whether all sequences have ended."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)
