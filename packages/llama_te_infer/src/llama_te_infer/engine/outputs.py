"""The outputs of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..runner.stopping import FinishReason
from .logprobs import LogprobRecords, TokenLogprobs
from .statistics import EngineStats, RequestTimes


class ReadLater:
    """A field of a dataclass for a list of log-probabilities, which may be given as `LogprobRecords`.

    The first access makes the list. A copy, also in another process, has what its original has.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn the field's name."""
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        """Return the list; of the class the default, `None`."""
        if instance is None:
            return None
        value = instance.__dict__[self._name]
        if isinstance(value, LogprobRecords):
            value = instance.__dict__[self._name] = value.read()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        """Keep the list or the records. The dataclass alone calls this."""
        instance.__dict__[self._name] = value


@dataclass(frozen=True)
class Completion:
    """One text that continues a prompt.

    Attributes:
        index: Its number among the completions of the request; with beams 0 is the best.
        token_ids: The tokens, with the token that ended the text.
        text: The decoded tokens, without special and stop tokens, up to a stop string; empty without a tokenizer.
        finish_reason: "stop" (an EOS or stop token, or a stop string), "length" (`max_tokens`), "cancelled", or "error"
            (see `RequestOutput.error`).
        stop_reason: The stop string or the token that ended the text.
        logprobs: For each token, if `SamplingParams.logprobs` asks for them.
        score: Of a beam: the sum of its log-probabilities over its length to the power of the length penalty.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = ReadLater()  # type: ignore[assignment]  # it returns this type
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """The complete output of a request.

    Attributes:
        request_id: The id that `submit` returned.
        prompt_token_ids: The prompt.
        outputs: `n` completions.
        prompt_logprobs: For each token of the prompt given the tokens before it, `None` for the first one, if
            `SamplingParams.prompt_logprobs` asks for them and the prompt was read to its end.
        error: The exception that ended the request: of its callback or of the tokenizer, a GrammarError if its text
            cannot go on in its form, or a FloatingPointError if the model's logits for it are not finite. `None` if all
            is well.
        num_cached_tokens: Tokens of the prompt that came from the prefix cache.
        times: When it arrived, began and wrote its tokens.
    """

    request_id: int
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = ReadLater()  # type: ignore[assignment]  # likewise
    error: Exception | None = None
    # Equal outputs may come at other times and from another cache.
    num_cached_tokens: int = field(default=0, compare=False)
    times: RequestTimes | None = field(default=None, compare=False)


class TokenEvent(NamedTuple):
    """One more token of a completion, or its end.

    Attributes:
        request_id: The id that `submit` returned.
        index: The completion's number.
        token_id: The token; `None` if the completion ends without one ("cancelled", "error").
        text: The text that became readable. It may lag behind the tokens: a character of several tokens comes with the
            last of them, and the possible beginning of a stop string comes when it has turned out not to be one.
        logprobs: Of this token, if the request asks for them.
        finish_reason: Set on the last event of a completion.
        stop_reason: See `Completion`.
        error: See `RequestOutput`; set with the finish reason "error".
        prompt_logprobs: See `RequestOutput`; set on the first event of a completion.
    """

    # A tuple, since each step makes one for each sequence, and a frozen dataclass takes three times as long to make.
    request_id: int
    index: int  # type: ignore[assignment]  # tuples have a method of this name
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


@dataclass
class News:
    """What an engine has done since the last news.

    Attributes:
        events: Of all requests, in their order.
        outputs: Of the requests that have ended.
        lost: The ids of requests that were lost in a step that failed.
        failure: The error of the last step, if that step failed.
        stats: The engine's load and counters after the step.
    """

    events: list[TokenEvent] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    failure: Exception | None = None
    stats: EngineStats | None = None
