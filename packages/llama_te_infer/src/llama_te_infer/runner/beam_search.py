"""Beam search in two parts, which together find what transformers' beam search finds.

The device's part picks the next tokens and waits for nobody. The host's part reads what was picked, at any time after,
keeps the finished sequences and tells when the search is over; steps that the device took beyond that are dropped.

Shapes: G groups (prompts), B beams of a group, V vocabulary, E tokens that end a sequence, C candidates of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .sampler import largest

NO_BEAM = -1e9  # the score of beams that are not there yet


class BeamStep(NamedTuple):
    """What one step picked. Sources are beams of the same group, from 0; scores are sums of log-probabilities.

    Attributes:
        token_GB: int64, the tokens that the beams of the next step end with.
        source_GB: int64, the beams that they go on from.
        score_GB: float32, best first.
        candidate_token_GC: int64, the most likely continuations, among them those that end here.
        candidate_source_GC: int64.
        candidate_score_GC: float32, best first.
    """

    token_GB: torch.Tensor
    source_GB: torch.Tensor
    score_GB: torch.Tensor
    candidate_token_GC: torch.Tensor
    candidate_source_GC: torch.Tensor
    candidate_score_GC: torch.Tensor


def first_scores(groups: int, num_beams: int, device: torch.device | str) -> torch.Tensor:
    """float32 [G, B]: scores before the first step, where all beams are the prompt and only the first one counts."""
    score_GB = torch.full((groups, num_beams), NO_BEAM, device=device)
    score_GB[:, 0] = 0
    return score_GB


def select_beams(
    logits_GBV: torch.Tensor,
    score_GB: torch.Tensor,
    ending_token_GE: torch.Tensor,
    may_not_end_G: torch.Tensor | None = None,
) -> BeamStep:
    """Pick the continuations of all beams. Can be captured in a CUDA graph; does not wait for the device.

    Of equally good candidates the one of the lower beam, then of the lower token id, comes first.

    Args:
        logits_GBV: Of each beam's next token, in any floating type; V of at least E + 1.
        score_GB: float32, as `first_scores` or the last step has it.
        ending_token_GE: int64, the tokens that end a sequence; -1 where a group has fewer than others.
        may_not_end_G: bool, the groups whose sequences are too short to end yet; none by default.

    Returns:
        The step, with C = max(2, E + 1) * B candidates: so many that B of them do not end.
    """
    num_beams, vocab_size = logits_GBV.shape[1:]
    score_GBV = logits_GBV.float().log_softmax(dim=-1) + score_GB[:, :, None]
    if may_not_end_G is not None:
        token_V = torch.arange(vocab_size, device=logits_GBV.device)
        ends_GV = (token_V[:, None] == ending_token_GE[:, None, :]).any(dim=-1)
        score_GBV.masked_fill_((ends_GV & may_not_end_G[:, None])[:, None, :], -torch.inf)

    candidates = max(2, ending_token_GE.shape[1] + 1) * num_beams
    candidate_score_GC, place_GC = largest(score_GBV.flatten(1), candidates)
    candidate_source_GC = place_GC.div(vocab_size, rounding_mode="floor")
    candidate_token_GC = place_GC - candidate_source_GC * vocab_size

    ends_GC = (candidate_token_GC[:, :, None] == ending_token_GE[:, None, :]).any(dim=-1)
    going_on_GB = ends_GC.byte().sort(dim=1, stable=True).indices[:, :num_beams]
    return BeamStep(
        candidate_token_GC.gather(1, going_on_GB),
        candidate_source_GC.gather(1, going_on_GB),
        candidate_score_GC.gather(1, going_on_GB),
        candidate_token_GC,
        candidate_source_GC,
        candidate_score_GC,
    )


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence of beam search.

    Attributes:
        token_ids: What was written after the prompt, with the token that ended it if one did.
        score: Its log-probability over its length to the power of the length penalty.
    """

    token_ids: tuple[int, ...]
    score: float


class _Finished(NamedTuple):
    score: float
    length: int
    source: int  # the beam before its last token
    token: int


class BeamHistory:
    """Follows the search of one group on the host.

    Args:
        num_beams: Beams of the group, B.
        ending_tokens: Tokens that end a sequence, the same that `select_beams` got for the group.
        max_tokens: Most tokens to write.
        length_penalty: See `SamplingParams`.
        early_stopping: See `SamplingParams`.

    Attributes:
        done: Whether the search is over.
    """

    def __init__(
        self,
        num_beams: int,
        ending_tokens: Collection[int],
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        self.num_beams, self.ending_tokens, self.max_tokens = num_beams, frozenset(ending_tokens), max_tokens
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.done = False
        self._token_SB: list[list[int]] = []  # of each step S: what its beams ended with, and the beams before them
        self._source_SB: list[list[int]] = []
        self._finished: list[_Finished] = []  # the best ones, at most B, best first

    def add(self, tokens: Sequence[int], sources: Sequence[int], scores: Sequence[float]) -> None:
        """Take note of a step; does nothing once the search is over.

        Args:
            tokens: `candidate_token_GC` of this group, C numbers.
            sources: `candidate_source_GC`.
            scores: `candidate_score_GC`.
        """
        if self.done:
            return
        length = len(self._token_SB) + 1
        at_limit = length == self.max_tokens
        going_on = []
        for i, (token, source, score) in enumerate(zip(tokens, sources, scores, strict=True)):
            if not at_limit and token not in self.ending_tokens:
                going_on.append(i)
            elif i < self.num_beams:  # an end that is less likely than B other candidates does not count
                self._finished.append(_Finished(self._normalized(score, length), length, source, token))
        self._finished.sort(key=lambda finished: -finished.score)
        del self._finished[self.num_beams :]
        self._token_SB.append([tokens[i] for i in going_on[: self.num_beams]])
        self._source_SB.append([sources[i] for i in going_on[: self.num_beams]])
        self.done = at_limit or (
            len(self._finished) == self.num_beams
            and (self.early_stopping is True or not self._can_improve(scores[going_on[0]], length))
        )

    def best(self, n: int) -> list[Hypothesis]:
        """The n best finished sequences, best first; fewer before the search is over."""
        return [Hypothesis(self._tokens(finished), finished.score) for finished in self._finished[:n]]

    def _can_improve(self, best_score: float, length: int) -> bool:
        """Whether the best running beam might end with a better score than the worst finished sequence."""
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return self._normalized(best_score, length) > self._finished[-1].score

    def _normalized(self, score: float, length: int) -> float:
        """The score over the length's power, rounded as in float32: the search may end a step later otherwise."""
        return _float32(score / _float32(float(length) ** self.length_penalty))

    def _tokens(self, finished: _Finished) -> tuple[int, ...]:
        tokens, beam = [finished.token], finished.source
        for step in reversed(range(finished.length - 1)):
            tokens.append(self._token_SB[step][beam])
            beam = self._source_SB[step][beam]
        return tuple(reversed(tokens))


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
