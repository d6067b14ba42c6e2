"""Beam search with the results of transformers' beam search, in two parts.

The device's part picks the next tokens and never waits for the host. The host's part reads the picked tokens at any
later time, keeps the finished sequences and decides when the search is over. It ignores further steps of the device.

Shapes: G groups (prompts), B beams of a group, V vocabulary, E end tokens, C candidates of a step, K most likely tokens
to report.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from ..structured_outputs import GrammarError
from .grammar import NOTHING_ALLOWED, GrammarText
from .logprobs import largest
from .stopping import NOT_FINITE, StopRule

NO_BEAM = -1e9  # the score of beams that do not exist yet
LEAST_SCORE = (
    NO_BEAM / 2
)  # beams with less only fill up the number: a grammar can have fewer texts than there are beams


class BeamStep(NamedTuple):
    """The picks of one step. Sources are beams of the same group, from 0; scores are sums of log-probabilities.

    Attributes:
        token_GB: int64, the last tokens of the next step's beams.
        source_GB: int64, the beams that they continue.
        score_GB: float32, best first.
        candidate_token_GC: int64, the most likely continuations, with the end tokens among them.
        candidate_source_GC: int64.
        candidate_score_GC: float32, best first; NaN for a group with a beam whose logits are not finite.
        text_ends_GC: bool, candidates whose text ends with a stop string or is complete in its grammar; `None` if no
            group has stop strings or a grammar.
        candidate_logprob_GC: float32, the model's log-probabilities of the candidates' tokens; `None` if no group
            reports them, as the following ones.
        top_logprob_GBK: float32, the highest log-probabilities after each beam, in descending order.
        top_token_GBK: int64, their tokens.
    """

    token_GB: torch.Tensor
    source_GB: torch.Tensor
    score_GB: torch.Tensor
    candidate_token_GC: torch.Tensor
    candidate_source_GC: torch.Tensor
    candidate_score_GC: torch.Tensor
    text_ends_GC: torch.Tensor | None = None
    candidate_logprob_GC: torch.Tensor | None = None
    top_logprob_GBK: torch.Tensor | None = None
    top_token_GBK: torch.Tensor | None = None


class BeamTexts(Protocol):
    """The texts of a search's beams, which stop strings or a grammar end. They are as far as the launched steps.

    Attributes:
        grammars: For each beam how far it has come in the search's grammar; `None` without a grammar, and for beams
            that only fill up the number.
    """

    grammars: list[GrammarText | None]

    def ends(self, tokens: Sequence[int], sources: Sequence[int]) -> list[bool]:
        """Take one step: choose among candidates as `select_beams` does.

        Args:
            tokens: `candidate_token_GC` of this group, C numbers.
            sources: `candidate_source_GC`.

        Returns:
            Whether each candidate's text ends with a stop string, or its grammar lets no token follow.
        """
        ...


def first_scores(groups: int, num_beams: int, device: torch.device | str) -> torch.Tensor:
    """Return the scores before the first step, float32 [G, B]. All beams hold the prompt; only the first one counts."""
    score_GB = torch.full((groups, num_beams), NO_BEAM, device=device)
    score_GB[:, 0] = 0
    return score_GB


def select_beams(
    logits_GBV: torch.Tensor,
    score_GB: torch.Tensor,
    ending_token_GE: torch.Tensor,
    may_not_end_G: torch.Tensor | None = None,
    text_ends: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    top_logprobs: int | None = None,
    allowed_GBV: torch.Tensor | None = None,
) -> BeamStep:
    """Pick the continuations of all beams. Does not wait for the device, and can be captured in a CUDA graph.

    Among equally good candidates the lower beam comes first, then the lower token id.

    Args:
        logits_GBV: Logits of each beam's next token, in any floating type.
        score_GB: float32, from `first_scores` or the last step.
        ending_token_GE: int64, the end tokens of each group, padded with -1.
        may_not_end_G: bool, whether the group's sequences are too short to end; by default none is.
        text_ends: Returns `text_ends_GC`, given `candidate_token_GC` and `candidate_source_GC`. It may wait.
        top_logprobs: The number of most likely tokens to report after each beam; `None` for no log-probabilities.
        allowed_GBV: bool, the tokens that may follow each beam; by default all. The others get the score -inf, and
            scores stay sums of the model's own log-probabilities.

    Returns:
        The step, with C = min(max(2, E + 1), V) * B candidates. At least B of these do not end with an end token,
        unless all tokens of the vocabulary are end tokens. Where fewer candidates continue, since tokens or texts end
        them, ended ones fill up the beams. Those with ended texts have a score that keeps them behind all others.
    """
    groups, num_beams, vocab_size = logits_GBV.shape
    logprob_GBV = logits_GBV.float().log_softmax(dim=-1)
    score_GBV = logprob_GBV + score_GB[:, :, None]
    # A table, since a comparison of each token with each end token would need V * E bytes.
    ends_GV = torch.zeros(groups, vocab_size + 1, dtype=torch.bool, device=logits_GBV.device)
    ends_GV = ends_GV.scatter_(1, ending_token_GE.where(ending_token_GE >= 0, vocab_size), True)[:, :vocab_size]
    if may_not_end_G is not None:
        score_GBV.masked_fill_((ends_GV & may_not_end_G[:, None])[:, None, :], -torch.inf)

    if allowed_GBV is not None:
        score_GBV.masked_fill_(~allowed_GBV, -torch.inf)

    candidates = min(max(2, ending_token_GE.shape[1] + 1), vocab_size) * num_beams
    candidate_score_GC, place_GC = largest(score_GBV.flatten(1), candidates)
    candidate_source_GC = place_GC.div(vocab_size, rounding_mode="floor")
    candidate_token_GC = place_GC - candidate_source_GC * vocab_size
    # Logits that are not finite make all log-probabilities of their beam NaN, so the first one shows it.
    candidate_score_GC.masked_fill_(logprob_GBV[:, :, 0].isnan().any(dim=1, keepdim=True), torch.nan)

    ends_GC = ends_GV.gather(1, candidate_token_GC)
    text_ends_GC = None
    running_score_GC = candidate_score_GC
    if text_ends is not None:
        text_ends_GC = text_ends(candidate_token_GC, candidate_source_GC)
        ends_GC |= text_ends_GC
        running_score_GC = candidate_score_GC + ends_GC * NO_BEAM
    reported: list[torch.Tensor] = []
    if top_logprobs is not None:
        reported = [logprob_GBV.flatten(1).gather(1, place_GC), *largest(logprob_GBV, min(top_logprobs, vocab_size))]
    continuing_GB = ends_GC.byte().sort(dim=1, stable=True).indices[:, :num_beams]
    return BeamStep(
        candidate_token_GC.gather(1, continuing_GB),
        candidate_source_GC.gather(1, continuing_GB),
        running_score_GC.gather(1, continuing_GB),
        candidate_token_GC,
        candidate_source_GC,
        candidate_score_GC,
        text_ends_GC,
        *reported,
    )


class Position(NamedTuple):
    """Log-probabilities at one position of a beam: of its token, and of the most likely tokens with their ids."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence of beam search.

    Attributes:
        token_ids: The tokens after the prompt, with the end token if there is one.
        score: Its log-probability divided by length ** length_penalty.
        positions: The log-probabilities of each token, if the search reports them.
    """

    token_ids: tuple[int, ...]
    score: float
    positions: tuple[Position, ...] | None = None


class _Finished(NamedTuple):
    score: float
    length: int
    source: int  # the beam before its last token
    token: int
    logprob: float | None


class BeamHistory:
    """Follows the search of one group on the host.

    Args:
        num_beams: Beams of the group, B.
        stop: The stop rule. The caller gives `select_beams` the same end tokens and minimum length.
        length_penalty: See `SamplingParams`.
        early_stopping: See `SamplingParams`.

    Attributes:
        done: Whether the search is over.
    """

    def __init__(
        self,
        num_beams: int,
        stop: StopRule,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        self.num_beams, self.stop = num_beams, stop
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.done = False
        self._token_SB: list[list[int]] = []  # for each step S: its beams' last tokens, and the beams before them
        self._source_SB: list[list[int]] = []
        self._logprob_SB: list[list[float | None]] = []
        self._top_SB: list[list[list[tuple[int, float]]]] = []  # after the beams before step S
        self._finished: list[_Finished] = []  # the best ones, at most B, best first

    def add(
        self,
        tokens: Sequence[int],
        sources: Sequence[int],
        scores: Sequence[float],
        text_ends: Sequence[bool] | None = None,
        logprobs: Sequence[float] | None = None,
        top: list[list[tuple[int, float]]] | None = None,
    ) -> None:
        """Record a step. Does nothing once the search is over.

        Args:
            tokens: `candidate_token_GC` of this group, C numbers.
            sources: `candidate_source_GC`.
            scores: `candidate_score_GC`.
            text_ends: `text_ends_GC`; by default no text ends.
            logprobs: `candidate_logprob_GC`; by default the hypotheses get none.
            top: For each beam before the step, the most likely tokens and their log-probabilities.

        Raises:
            FloatingPointError: A beam's logits are not finite.
            GrammarError: The grammar and the stop rule leave no token to any beam.
        """
        if self.done:
            return
        if math.isnan(scores[0]):
            raise FloatingPointError(NOT_FINITE)
        if scores[0] == -math.inf:
            raise GrammarError(NOTHING_ALLOWED)
        length = len(self._token_SB) + 1
        at_limit = self.stop.is_complete(length)
        # `select_beams` excludes end tokens in beams that are too short, so there is no length check here.
        continuing: list[int] = []
        ended: list[int] = []
        for i, (token, source, score) in enumerate(zip(tokens, sources, scores, strict=True)):
            ends = at_limit or token in self.stop.end_tokens or (text_ends is not None and text_ends[i])
            (ended if ends else continuing).append(i)
            if ends and i < self.num_beams and score > LEAST_SCORE:  # a less likely end does not count
                logprob = None if logprobs is None else logprobs[i]
                self._finished.append(_Finished(self._normalized(score, length), length, source, token, logprob))
        is_last = all(scores[i] <= LEAST_SCORE for i in continuing)
        best_score = scores[(continuing or ended)[0]]
        continuing += ended  # they fill up the beams, as `select_beams` says
        self._finished.sort(key=lambda finished: -finished.score)
        del self._finished[self.num_beams :]
        self._token_SB.append([tokens[i] for i in continuing[: self.num_beams]])
        self._source_SB.append([sources[i] for i in continuing[: self.num_beams]])
        self._logprob_SB.append([None if logprobs is None else logprobs[i] for i in continuing[: self.num_beams]])
        if top is not None:
            self._top_SB.append(top)
        self.done = is_last or (
            len(self._finished) == self.num_beams
            and (self.early_stopping is True or not self._can_improve(best_score, length))
        )

    def best(self, n: int) -> list[Hypothesis]:
        """Return the n best finished sequences, best first; fewer before the search is over.

        After it there can be fewer too: a grammar may have fewer texts.
        """
        return [self._hypothesis(finished) for finished in self._finished[:n]]

    def _can_improve(self, best_score: float, length: int) -> bool:
        """Return whether the best running beam might end with a better score than the worst finished sequence."""
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.stop.max_tokens
        return self._normalized(best_score, length) > self._finished[-1].score

    def _normalized(self, score: float, length: int) -> float:
        """Divide the score by the length's power and round to float32; in float64 the search might end a step later."""
        return _float32(score / _float32(float(length) ** self.length_penalty))

    def _hypothesis(self, finished: _Finished) -> Hypothesis:
        """Follow a sequence back to its first token."""
        tokens, logprobs, sources = [finished.token], [finished.logprob], [finished.source]
        for step in reversed(range(finished.length - 1)):
            beam = sources[-1]
            tokens.append(self._token_SB[step][beam])
            logprobs.append(self._logprob_SB[step][beam])
            sources.append(self._source_SB[step][beam])
        positions = None
        if self._top_SB:
            positions = tuple(
                Position(logprob, self._top_SB[step][source])
                for step, (logprob, source) in enumerate(zip(reversed(logprobs), reversed(sources), strict=True))
                if logprob is not None
            )
        return Hypothesis(tuple(reversed(tokens)), finished.score, positions)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
