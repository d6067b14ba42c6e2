"""Requests to the engine, the sequences that they are made of, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..runner.beam_search import BeamHistory
from ..sampling_params import SamplingParams
from .output_text import Detokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of a text, under the model's logits as they are.

    Attributes:
        logprob: Of the token that was chosen.
        top: Of the most likely tokens, the most likely one first: pairs of a token id and its log-probability.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One text that continues a prompt.

    Attributes:
        index: Its number among the completions of the request; with beams 0 is the best.
        token_ids: The tokens, with the one that ended it.
        text: The tokens decoded, without special tokens, stop tokens and from a stop string on; empty without a
            tokenizer.
        finish_reason: "stop" (an EOS or stop token, or a stop string), "length" (`max_tokens`), "cancelled", or "error"
            (its callback raised).
        stop_reason: The stop string or the token that ended it.
        logprobs: For each token, where `SamplingParams.logprobs` asks for them.
        score: Of a beam: the sum of its log-probabilities over its length to the power of the length penalty.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All that came of a request.

    Attributes:
        request_id: What `submit` returned.
        prompt_token_ids: The prompt.
        outputs: `n` completions.
        prompt_logprobs: The log-probability of each token of the prompt given those before it, `None` for the first
            one, where `SamplingParams.prompt_logprobs` asks for them and the prompt was read to its end.
        error: What the request's callback raised.
    """

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[float | None] | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One token more of a completion, or its end.

    Attributes:
        request_id: What `submit` returned.
        index: The completion's number.
        token_id: The token; `None` where a completion ends without one ("cancelled", "error").
        text: What became readable. It may lag behind the tokens: characters of several tokens, and what may turn out to
            be a stop string, come when that is decided.
        logprobs: Of this token, where they were asked for.
        finish_reason: Set on the last event of a completion.
        stop_reason: See `Completion`.
    """

    request_id: int
    index: int
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(eq=False)
class Sequence:
    """A text under way: a row of the running batch, or waiting to be one.

    Attributes:
        request: Whose it is.
        index: Its number there: the completion's, or the beam's.
        tokens: The prompt, and what was read back from the device. Beams have the prompt only.
        pages: Of the cache; for beams as far as the host knows (see `Scheduler.reorder`).
        cached: Tokens whose keys and values the steps launched so far write. While the sequence runs there is one
            token more, the one that the last of these steps chooses.
        row: Its row in the running batch; `None` while its prompt is read, waiting or at the end.
        logprobs: Of the tokens after the prompt.
        detokenizer: Has their text.
        finish_reason: Set at the end.
        stop_reason: Likewise.
        score: Of a beam, at the end.
    """

    request: Request
    index: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    row: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    detokenizer: Detokenizer = field(default_factory=Detokenizer)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None

    @property
    def written(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def is_launched_whole(self) -> bool:
        """Whether the steps launched so far choose all tokens that it may have."""
        return self.cached + 1 >= self.request.longest


@dataclass(eq=False)
class Request:
    """A prompt and what to do with it.

    Attributes:
        id: Numbers requests in the order of their submission.
        prompt: Its tokens.
        params: How to continue it.
        seed: Of the random choices.
        ending_tokens: Tokens that end a sequence.
        on_token: Called with each event.
        sequences: `n` of them, or as many as there are beams.
        history: Of beam search; a new one each time that it starts. What was launched before is read before then.
        prompt_logprobs: By place in the prompt, as they come in.
        error: What `on_token` raised.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int = 0
    ending_tokens: tuple[int, ...] = ()
    on_token: Callable[[TokenEvent], None] | None = None
    sequences: list[Sequence] = field(init=False)
    history: BeamHistory | None = None
    prompt_logprobs: dict[int, float] = field(default_factory=dict)
    error: Exception | None = None

    def __post_init__(self) -> None:
        count = max(self.params.n, self.params.num_beams)
        self.sequences = [Sequence(self, index, list(self.prompt)) for index in range(count)]

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have, those of the prompt included."""
        return len(self.prompt) + self.params.max_tokens

    @property
    def has_beams(self) -> bool:
        """Whether the sequences are beams of one search."""
        return self.params.num_beams > 1

    @property
    def is_finished(self) -> bool:
        """Whether all sequences have come to an end."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)
