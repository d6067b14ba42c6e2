"""The results of a step, and their way from the device to the host.

Shapes: B rows, G searches, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..transfers import to_host
from .beam_search import BeamStep
from .logprobs import Logprobs
from .sequence import Request, Sequence


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a part of a prompt.

    Attributes:
        request: The prompt's request.
        position: Of the part's first token in the prompt.
        logprobs: Of the part's tokens, and of the most likely ones at their positions, if the request asks for them.
    """

    request: Request
    position: int
    logprobs: Logprobs


class Search(NamedTuple):
    """A beam search that takes part in a step.

    Attributes:
        request: The search's request.
        rows: Its beams' rows.
        length: Tokens of each beam in the cache after the step.
        is_new: Whether the step has just read its prompt.
    """

    request: Request
    rows: list[int]
    length: int
    is_new: bool


class BeamResult(NamedTuple):
    """The result of a step for one search.

    Attributes:
        request: The search's request.
        length: Tokens of each beam in the cache; the beam kept them of its source.
        sources: The beam that each beam continues.
        candidate_tokens: See `BeamHistory.add`.
        candidate_sources: See there.
        candidate_scores: See there.
        text_ends: See there.
        candidate_logprobs: See there.
        top: See there.
    """

    request: Request
    length: int
    sources: list[int]
    candidate_tokens: list[int]
    candidate_sources: list[int]
    candidate_scores: list[float]
    text_ends: list[bool] | None = None
    candidate_logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


class StepResult(NamedTuple):
    """The tokens that a step chose.

    Attributes:
        tokens: The next token of each sequence that is not a beam.
        logprobs: Of these tokens, on the host; `None` if no row asked for log-probabilities.
        beams: The result for each search.
        prompt_logprobs: Of parts of prompts, on the host.
    """

    tokens: list[tuple[Sequence, int]]
    logprobs: Logprobs | None
    beams: list[BeamResult]
    prompt_logprobs: list[PromptLogprobs]


@dataclass
class Pending:
    """A launched step. The device copies its results to the host while it computes.

    Attributes:
        sequences: The sequences that are not beams, with their rows.
        failed: Requests whose beams' texts could not be read, and the exceptions.
    """

    sequences: list[tuple[int, Sequence]]
    token_B: torch.Tensor | None = None
    logprobs: Logprobs | None = None
    searches: list[tuple[list[Search], BeamStep]] = field(default_factory=list)
    prompts: list[PromptLogprobs] = field(default_factory=list)
    failed: list[tuple[Request, Exception]] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None
    _result: StepResult | None = None

    def send_back(self) -> None:
        """Start the copies to a GPU's host."""
        self.token_B = _to_host(self.token_B)
        if self.logprobs is not None:
            self.logprobs = self.logprobs.map(to_host)
        self.searches = [(searches, BeamStep._make(map(_to_host, step))) for searches, step in self.searches]
        self.prompts = [part._replace(logprobs=part.logprobs.map(to_host)) for part in self.prompts]
        self.arrived = torch.cuda.Event()
        self.arrived.record()

    def result(self) -> StepResult:
        """Wait until the device has computed the step, and return its results. The tokens advance their grammars."""
        if self._result is None:
            self._result = self._read()
            for sequence, token in self._result.tokens:
                if sequence.grammar is not None and sequence.finish_reason is None:
                    sequence.grammar.add(token)
        return self._result

    def _read(self) -> StepResult:
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens = [] if self.token_B is None else self.token_B.tolist()
        return StepResult(
            tokens=[(sequence, tokens[row]) for row, sequence in self.sequences],
            logprobs=None if self.logprobs is None else self._of_sequences(self.logprobs),
            beams=[result for searches, step in self.searches for result in _beam_results(searches, step)],
            prompt_logprobs=self.prompts,
        )

    def _of_sequences(self, logprobs: Logprobs) -> Logprobs:
        """Leave out the rows of beams."""
        rows = [row for row, _ in self.sequences]
        if rows == list(range(len(logprobs.logprob_B))):
            return logprobs
        return logprobs.map(lambda tensor: tensor[rows])


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else to_host(tensor)


def _beam_results(searches: list[Search], step: BeamStep) -> list[BeamResult]:
    lists = (
        step.source_GB,
        step.candidate_token_GC,
        step.candidate_source_GC,
        step.candidate_score_GC,
        step.text_ends_GC,
        step.candidate_logprob_GC,
    )
    columns = zip(*([None] * len(searches) if t is None else t.tolist() for t in lists), strict=True)
    results = [
        BeamResult(search.request, search.length, *column) for search, column in zip(searches, columns, strict=True)
    ]
    if step.top_token_GBK is None or step.top_logprob_GBK is None:
        return results
    tops = zip(step.top_token_GBK.tolist(), step.top_logprob_GBK.tolist(), strict=True)
    return [
        result._replace(top=[list(zip(*beam, strict=True)) for beam in zip(*top, strict=True)])
        for result, top in zip(results, tops, strict=True)
    ]
